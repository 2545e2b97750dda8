"""Which picture a row of a metadata file means."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from ldm.data.sources.item import Reject
from ldm.data.sources.tables import read_table
from ldm.data.sources.tree import Tree, composed
from ldm.errors import ConfigError
from ldm.text.reading import printable


def captions_by_table(tree: Tree, given: Path | None) -> tuple[dict[str, str], list[Reject]]:
    """{picture's name: caption} from the metadata file given, else from every folder's own; rows not used as Rejects.

    Where several name a picture, the nearest above it counts: it is the one that was made for its folder.
    """
    captions: dict[str, str] = {}
    rejects: list[Reject] = []
    nearest_last = sorted([given] if given is not None else tables(tree), key=lambda path: len(path.parts))
    for path in nearest_last:
        names = _Names(tree, path.parent, everywhere=given is not None)
        table = read_table(path)
        rejects += table.rejects
        found: dict[str, tuple[bool, str]] = {}  # picture -> (named exactly, caption)
        for row, caption in table.captions.items():
            pictures, exactly = names.meant(row)
            where = f"{path.name}, {printable(row)}"
            if len(pictures) > 1:
                detail = f"may be {' or '.join(printable(name) for name in pictures[:2])}: write the path"
                rejects.append(Reject(where, "row of several pictures", detail))
            for name in pictures if len(pictures) == 1 else ():
                before = found.get(name)
                if before is not None and before[0] == exactly and before[1] != caption:
                    detail = f"{printable(name)} has a caption already; the first counts"
                    rejects.append(Reject(where, "second caption of a picture", detail))
                elif before is None or exactly > before[0]:
                    found[name] = exactly, caption
            if "\n" in caption:
                _refuse_swallowed(path, names, row, caption)
        captions |= {name: caption for name, (_, caption) in found.items()}
    return captions, rejects


def tables(tree: Tree) -> list[Path]:
    """The metadata files; ConfigError where a folder has two, because an old one would be taken for the new."""
    of_folder: dict[Path, Path] = {}
    for path in tree.tables:
        first = of_folder.setdefault(path.parent, path)
        if first != path:
            raise ConfigError(
                f"{path.parent} holds {first.name} and {path.name}: say which, source.captions={first}, or move one."
            )
    return tree.tables


class _Names:
    """The pictures by the ways in which the metadata file of a folder may name them."""

    def __init__(self, tree: Tree, folder: Path, everywhere: bool) -> None:
        self.root = os.path.abspath(tree.root)
        self.real_root = os.path.realpath(tree.root)
        self.folder = os.path.relpath(os.path.abspath(folder), self.root)
        self.names = {tree.name(path) for path in tree.pictures}
        self.alike: dict[str, list[str]] = {}  # composed, suffix in lower case
        self.bare: dict[str, list[str]] = {}  # without its folders
        # A folder's own metadata file speaks of what is in it.
        self.inside = "" if everywhere or self.folder == "." else f"{self.folder}/"
        for name in sorted(self.names):
            self.alike.setdefault(_plain(name), []).append(name)
            if name.startswith(self.inside):
                self.bare.setdefault(_plain(posixpath.basename(name)), []).append(name)

    def meant(self, row: str) -> tuple[list[str], bool]:
        """(names, whether the row gives their path). A path counts from the metadata file's folder, then from the root.

        A name without folders means a picture in a sub-folder too, where only one has it and no other row can mean it.
        """
        forms = dict.fromkeys((row.strip(), row.strip().replace("\\", "/")))
        paths = [path for form in forms for path in self._places(form)]
        for path in paths:
            if path in self.names:
                return [path], True
        for path in paths:
            if found := self.alike.get(_plain(path)):
                return found, True
        for form in forms:
            bare = posixpath.normpath(form)
            if "/" not in bare and (found := self.bare.get(_plain(bare))):
                return found, False
        return [], False

    def _places(self, form: str) -> list[str]:
        """What a path comes to, relative to the root."""
        if posixpath.isabs(form):
            return [os.path.relpath(posixpath.normpath(form), root) for root in (self.root, self.real_root)]
        from_root = posixpath.normpath(form)
        places = [os.path.relpath(os.path.join(self.root, self.folder, form), self.root)]
        return places + [from_root] * from_root.startswith(self.inside)


def _plain(name: str) -> str:
    stem, suffix = posixpath.splitext(composed(name))
    return stem + suffix.lower()


def _refuse_swallowed(path: Path, names: _Names, row: str, caption: str) -> None:
    """An open quotation mark makes one caption of the rows up to the next: the text says so, if a line is a row's."""
    for line in caption.split("\n")[1:]:
        for mark in (",", "\t"):
            first, found, _ = line.partition(mark)
            if found and names.meant(first.strip('"'))[0]:
                raise ConfigError(
                    f"{path}: the caption of {printable(row)} goes over into the row of {printable(first)}: a quotation"
                    ' mark opens it and none ends it there. Write such a cell as """Untitled"", a lamp".'
                )
