"""A folder of pictures with captions beside them, in whatever formats and sizes people have."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.captions import CAPTIONS_WANTED, SampleError, decode_text
from ldm.data.fields import Fields
from ldm.data.order import validation_share
from ldm.data.sources.item import Item, Reject, image_item
from ldm.data.sources.matching import captions_by_table, tables
from ldm.data.sources.tree import PICTURES, Tree, walk
from ldm.data.threads import in_order
from ldm.data.transforms import MAX_PIXELS, open_image
from ldm.errors import ConfigError
from ldm.text.reading import printable

VERSION = 2  # part of the identity: raise it when the same folder gives other samples
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # these keep their bytes, others become png
SIZES = (32, 64, 128, 256, 512)
_BY_CONTENT = 4 << 30  # below 4 GiB the identity reads every file, above it trusts their times


class FolderSource:
    """Pictures under `images`, recursively, each with its caption: from a metadata file, else NAME.txt, else NAME.json.

    Linked folders are followed (`tree`), rows find their pictures by their paths (`matching`). A picture without
    caption, broken, too small or too large becomes a Reject with its reason, as does a row; a bad file ends nothing.
    """

    def __init__(
        self,
        images: str | None,
        captions: str | None = None,  # .jsonl .csv .tsv .parquet with a path and a caption column; found if metadata.*
        validation_fraction: float = 0.02,
        min_side: int = 16,
        max_pixels: int = MAX_PIXELS,
        max_image_size: int = 512,  # bound of the recommended image_size
        uncaptioned: bool = False,  # true: pictures without a caption get the empty one
        threads: int = 2,
    ) -> None:
        self.images, self.captions, self.validation_fraction = images, captions, validation_fraction
        self.min_side, self.max_pixels, self.max_image_size = min_side, max_pixels, max_image_size
        self.uncaptioned, self.threads = uncaptioned, threads
        self._sides: list[tuple[int, int]] = []
        self._words = 0

    def __iter__(self) -> Iterator[Item | Reject]:
        tree = self._tree()
        table, rejects = captions_by_table(tree, self._given(tree))
        yield from [*tree.rejects, *rejects]
        files, names = tree.pictures, [tree.name(path) for path in tree.pictures]
        held_out = validation_share([os.fsencode(name) for name in names], self.validation_fraction)
        self._sides, self._words = [], 0

        def read(i: int) -> tuple[Item | Reject, tuple[int, int], int]:
            try:
                return self._item(files[i], tree, table, "val" if held_out[i] else "train")
            except SampleError as error:
                return Reject(printable(names[i]), error.reason, printable(str(error))), (0, 0), 0
            except OSError as error:
                return Reject(printable(names[i]), "unreadable file", printable(str(error))), (0, 0), 0

        for item, side, words in in_order(read, range(len(files)), self.threads, 4 * self.threads):
            if isinstance(item, Item):
                self._sides.append(side)
                self._words = max(self._words, words)
            yield item

    def facts(self) -> dict[str, Any]:
        """Sizes, the longest caption, and the largest usual image_size that most pictures fill; after the iteration."""
        if not self._sides:
            for _ in self:
                pass
        if not self._sides:
            raise ConfigError(f"no usable picture with a caption in {self.images}. {CAPTIONS_WANTED}")
        shorter = sorted(min(side) for side in self._sides)
        median = int(np.median(shorter))
        fitting = [size for size in SIZES if size <= min(median, self.max_image_size)]
        return {
            "samples": len(self._sides),
            "shortest_side": shorter[0],
            "median_side": median,
            "longest_side": max(max(side) for side in self._sides),
            "image_size": max(fitting, default=SIZES[0]),
            "caption_words": self._words,
        }

    def identity(self) -> dict[str, Any]:
        """What determines the content: every file's path, size and content (its time instead of that above 4 GiB)."""
        tree = self._tree()
        files = {*tree.pictures, *self._tables(tree)}
        files |= {f for p in tree.pictures for s in ("txt", "json") if (f := tree.caption_file(p, s)) is not None}
        by = "content" if sum(path.stat().st_size for path in files) <= _BY_CONTENT else "mtime"
        digest = hashlib.sha256()
        for path in sorted(files):
            stat = path.stat()
            what = hashlib.sha256(path.read_bytes()).hexdigest() if by == "content" else str(stat.st_mtime_ns)
            name = os.path.relpath(path, tree.root)
            digest.update(repr((name, stat.st_size, what)).encode("utf-8", "surrogateescape"))
        options = (self.validation_fraction, self.min_side, self.max_pixels, self.uncaptioned)
        return {
            "source": "folder",
            "version": VERSION,
            "by": by,
            "files": digest.hexdigest(),
            "options": list(options),
        }

    def _tree(self) -> Tree:
        if not self.images:
            raise ConfigError(
                "source=folder needs images=DIR, a folder of pictures with captions in NAME.txt beside them."
            )
        root = Path(self.images)
        if not root.is_dir():
            raise ConfigError(f"images={root}: no such folder. Give images= the path of a folder of pictures.")
        tree = walk(root)
        if not tree.pictures:
            first = next((f"; {r.name}: {r.reason} ({r.detail})" for r in tree.rejects), "")
            raise ConfigError(
                f"images={root} holds no pictures ({', '.join(sorted(PICTURES))}){first}. Give another folder."
            )
        return tree

    def _given(self, tree: Tree) -> Path | None:
        if self.captions is None:
            return None
        path = Path(self.captions)
        found = next((p for p in (path, tree.root / path) if p.is_file()), None)
        if found is None:
            raise ConfigError(f"captions file {path} does not exist, here or in {tree.root}. Check source.captions=.")
        return found

    def _tables(self, tree: Tree) -> list[Path]:
        given = self._given(tree)
        return tables(tree) if given is None else [given]

    def _item(self, path: Path, tree: Tree, table: Mapping[str, str], split: str) -> tuple[Item, tuple[int, int], int]:
        data = path.read_bytes()
        image = open_image(data, self.max_pixels, formats())
        if min(image.size) < self.min_side:
            raise SampleError("too small", f"{image.width} x {image.height}, min_side is {self.min_side}")
        caption, name = self._caption(path, tree, table), tree.name(path)
        extension = COPIED.get(_format(data))
        if extension is None:
            extension, data = "png", _png(image)
        extra = {"path": printable(name), "width": image.width, "height": image.height}
        return image_item(data, extension, caption, extra, split), image.size, len(caption.split())

    def _caption(self, path: Path, tree: Tree, table: Mapping[str, str]) -> str:
        """From a metadata file that names the picture, else NAME.txt, else NAME.json."""
        caption = table.get(tree.name(path))
        if caption is None and (text := tree.caption_file(path, "txt")) is not None:
            caption = decode_text(text.read_bytes(), text.name)
        if caption is None and (record := tree.caption_file(path, "json")) is not None:
            caption = Fields().optional().caption_of({"json": record.read_bytes()})
        if not caption and not self.uncaptioned:
            reason, stem = "no caption" if caption is None else "empty caption", path.stem
            raise SampleError(reason, f"no {stem}.txt, no {stem}.json with a caption, no line in a metadata file")
        return " ".join((caption or "").split())


@cache
def formats() -> tuple[str, ...]:
    """What this Pillow reads of the formats people keep pictures in; not EPS, for which it would start a program."""
    Image.init()
    return tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM") if f in Image.OPEN)


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        return image.format or ""


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
