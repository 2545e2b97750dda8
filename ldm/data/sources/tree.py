"""What lies below a folder: pictures, captions beside them, metadata files; linked folders too, each once."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ldm.data.sources.item import Reject
from ldm.data.sources.tables import SUFFIXES
from ldm.text.reading import printable

PICTURES = {"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "heic", "heif"}
_BESIDE = {"txt", "json"}


@dataclass
class Tree:
    """The files below `root` by what they are, with the names that links give them; what cannot be read as Rejects."""

    root: Path
    pictures: list[Path] = field(default_factory=list)  # sorted by the bytes of their names
    beside: dict[str, dict[str, Path]] = field(default_factory=dict)  # path without suffix -> txt or json -> file
    tables: list[Path] = field(default_factory=list)  # metadata.*, of every folder
    rejects: list[Reject] = field(default_factory=list)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def caption_file(self, picture: Path, suffix: str) -> Path | None:
        """NAME.txt or NAME.json beside a picture, however its accents are composed and its suffix is written."""
        stem = str(picture.with_suffix(""))
        found = self.beside.get(stem, {}).get(suffix)
        if found is None:
            similar = [
                s for s in self.alike.get(composed(stem), ()) if suffix in self.beside[s] and s not in self.stems
            ]
            found = self.beside[similar[0]][suffix] if len(similar) == 1 else None
        return found

    @cached_property
    def stems(self) -> set[str]:
        """Paths of the pictures without their suffixes: a caption file of one of these is not another picture's."""
        return {str(path.with_suffix("")) for path in self.pictures}

    @cached_property
    def alike(self) -> dict[str, list[str]]:
        """Composed path -> paths as they are, of the caption files."""
        found: dict[str, list[str]] = {}
        for stem in self.beside:
            found.setdefault(composed(stem), []).append(stem)
        return found


def composed(name: str) -> str:
    """A name in Unicode's normal form C: Macs write é as e and an accent, others as one character."""
    return unicodedata.normalize("NFC", name)


def walk(root: Path) -> Tree:
    """All below a folder; hidden files are left out.

    A folder is read once, under its own name if it lies below `root`, else under the first link to it: so a link that
    leads back cannot go on for ever, and no picture is there twice. Such a link, a broken one and a folder that may not
    be read are Rejects.
    """
    tree = Tree(root)
    seen = set[tuple[int, int]]()
    links = list(_folder(root, tree, seen))
    while links:  # after all that is there by itself
        link = min(links, key=lambda path: (len(os.path.realpath(path)), os.fsencode(path)))  # the outermost first
        links.remove(link)
        links += _folder(link, tree, seen)
    tree.pictures.sort(key=os.fsencode)
    tree.tables.sort(key=os.fsencode)
    tree.rejects.sort(key=lambda reject: reject.name)
    return tree


def pictures_in(root: Path) -> list[Path]:
    """The files below a folder whose names end like pictures', sorted by their bytes; hidden ones are left out."""
    return walk(root).pictures


def _folder(top: Path, tree: Tree, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Enters what lies in a folder and its own sub-folders; yields the links to folders."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                _refuse(tree, folder, "folder is read already", f"it is {os.path.realpath(folder)}")
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            _refuse(tree, folder, "unreadable folder", str(error.strerror))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() and path.is_dir():
                yield path
            elif not entry.name.startswith("."):
                _file(path, tree)


def _file(path: Path, tree: Tree) -> None:
    suffix = path.suffix.lower().lstrip(".")
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        what = "broken link" if path.is_symlink() else "unreadable file"
        _refuse(tree, path, what, f"leads to {os.readlink(path)}" if path.is_symlink() else str(error.strerror))
        return
    if suffix in PICTURES:
        if regular:
            tree.pictures.append(path)
        else:
            _refuse(tree, path, "no plain file", "a device, a pipe or a socket")
    elif regular and suffix in _BESIDE:
        tree.beside.setdefault(str(path.with_suffix("")), {}).setdefault(suffix, path)
    elif regular and path.stem.lower() == "metadata" and f".{suffix}" in SUFFIXES:
        tree.tables.append(path)


def _refuse(tree: Tree, path: Path, reason: str, detail: str) -> None:
    tree.rejects.append(Reject(printable(tree.name(path)) if path != tree.root else ".", reason, printable(detail)))
