"""A folder of pictures with captions beside them, in whatever formats and sizes people have."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.captions import CAPTIONS_WANTED, SampleError, caption_of, decode_text
from ldm.data.plan import validation_share
from ldm.data.sources.item import Item, Reject, image_item
from ldm.data.threads import in_order
from ldm.data.transforms import MAX_PIXELS, open_image
from ldm.errors import ConfigError

PICTURES = {"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "heic", "heif"}
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # these keep their bytes, others become png
PATH_COLUMNS = ("file_name", "filename", "path", "image_path", "file", "image")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "title", "prompt")
SIZES = (32, 64, 128, 256, 512)
_BY_CONTENT = 4 << 30  # below 4 GiB the identity reads every file, above it trusts their times


class FolderSource:
    """Pictures under `images`, recursively, each with its caption: from a metadata file, else NAME.txt, else NAME.json.

    A picture without caption, broken, too small or too large becomes a Reject with its reason; a bad file ends nothing.
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
        root, files = self._files()
        table = self._table(root)
        names = [path.relative_to(root).as_posix() for path in files]
        held_out = validation_share([os.fsencode(name) for name in names], self.validation_fraction)
        self._sides, self._words = [], 0

        def read(i: int) -> tuple[Item | Reject, tuple[int, int], int]:
            try:
                return self._item(files[i], names[i], table, "val" if held_out[i] else "train")
            except SampleError as error:
                return Reject(_printable(names[i]), error.reason, str(error)), (0, 0), 0
            except OSError as error:
                return Reject(_printable(names[i]), "unreadable file", str(error)), (0, 0), 0

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
        root, files = self._files()
        files += [p for f in files for s in (".txt", ".json") if (p := f.with_suffix(s)).is_file()]
        if (metadata := self._metadata(root)) is not None:
            files.append(metadata)
        by = "content" if sum(path.stat().st_size for path in files) <= _BY_CONTENT else "mtime"
        digest = hashlib.sha256()
        for path in sorted(set(files)):
            stat = path.stat()
            what = hashlib.sha256(path.read_bytes()).hexdigest() if by == "content" else str(stat.st_mtime_ns)
            digest.update(repr((os.path.relpath(path, root), stat.st_size, what)).encode("utf-8", "surrogateescape"))
        options = (self.validation_fraction, self.min_side, self.max_pixels, self.uncaptioned)
        return {"source": "folder", "by": by, "files": digest.hexdigest(), "options": list(options)}

    def _files(self) -> tuple[Path, list[Path]]:
        if not self.images:
            raise ConfigError(
                "source=folder needs images=DIR, a folder of pictures with captions in NAME.txt beside them."
            )
        root = Path(self.images)
        if not root.is_dir():
            raise ConfigError(f"images={root}: no such folder. Give images= the path of a folder of pictures.")
        files = pictures_in(root)
        if not files:
            raise ConfigError(f"images={root} holds no pictures ({', '.join(sorted(PICTURES))}). Give another folder.")
        return root, files

    def _metadata(self, root: Path) -> Path | None:
        if self.captions is not None:
            path = Path(self.captions)
            found = next((p for p in (path, root / path) if p.is_file()), None)
            if found is None:
                raise ConfigError(f"captions file {path} does not exist, here or in {root}. Check source.captions=.")
            return found
        return next(
            (p for ext in ("jsonl", "csv", "tsv", "parquet") if (p := root / f"metadata.{ext}").is_file()), None
        )

    def _table(self, root: Path) -> dict[str, str]:
        path = self._metadata(root)
        return {} if path is None else read_table(path)

    def _item(self, path: Path, name: str, table: Mapping[str, str], split: str) -> tuple[Item, tuple[int, int], int]:
        data = path.read_bytes()
        image = open_image(data, self.max_pixels, formats())
        if min(image.size) < self.min_side:
            raise SampleError("too small", f"{image.width} x {image.height}, min_side is {self.min_side}")
        caption = self._caption(path, name, table)
        extension = COPIED.get(_format(data))
        if extension is None:
            extension, data = "png", _png(image)
        extra = {"path": _printable(name), "width": image.width, "height": image.height}
        return image_item(data, extension, caption, extra, split), image.size, len(caption.split())

    def _caption(self, path: Path, name: str, table: Mapping[str, str]) -> str:
        caption = table.get(name) or table.get(path.name)
        text, record = path.with_suffix(".txt"), path.with_suffix(".json")
        if caption is None and text.is_file():
            caption = decode_text(text.read_bytes(), text.name)
        if caption is None and record.is_file():
            caption = caption_of({"json": record.read_bytes()})
        if not caption and not self.uncaptioned:
            reason = "no caption" if caption is None else "empty caption"
            raise SampleError(reason, f"no {text.name}, no {record.name} with a caption, no line in a metadata file")
        return " ".join((caption or "").split())


def pictures_in(root: Path) -> list[Path]:
    """The files below a folder whose names end like pictures', sorted by their bytes; hidden ones are left out."""
    files = (p for p in root.rglob("*") if p.suffix.lower().lstrip(".") in PICTURES and not p.name.startswith("."))
    return sorted((p for p in files if p.is_file()), key=os.fsencode)


def read_table(path: Path) -> dict[str, str]:
    """A metadata file as {path: caption}; ConfigError naming the columns it has if none of the known is there."""
    rows: list[Mapping[str, Any]]
    try:
        if path.suffix == ".parquet":
            import pandas

            rows = pandas.read_parquet(path).to_dict("records")  # type: ignore[assignment]
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        else:
            raise ConfigError(f"{path}: captions come as .jsonl, .csv, .tsv or .parquet.")
    except (ValueError, OSError, ImportError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path} is unreadable: {error}") from None
    columns = sorted({str(name) for row in rows[:100] for name in row})
    where = next((c for c in PATH_COLUMNS if c in columns), None)
    what = next((c for c in CAPTION_COLUMNS if c in columns), None)
    if where is None or what is None:
        raise ConfigError(
            f"{path} has the columns {', '.join(columns) or 'none'}; it needs one of {', '.join(PATH_COLUMNS)} and one"
            f" of {', '.join(CAPTION_COLUMNS)}."
        )
    return {str(r[where]).removeprefix("./"): r[what] for r in rows if isinstance(r.get(what), str) and r.get(where)}


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


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
