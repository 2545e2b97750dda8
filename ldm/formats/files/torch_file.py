"""torch's files as plain data, in both layouts: zip archives, and what torch wrote before 1.6."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ldm.errors import ConfigError
from ldm.formats.files.torch_pickle import Damaged, Inert, Machine, Name
from ldm.untrusted import check_tree, shown

PROGRAM = 16 * 2**20  # bytes of a pickle at most
DIRECTORY = 8 * 2**20  # bytes of a zip archive's table of contents; 100 an entry
_MAGIC = 0x1950A86A20F9469CFC6C  # with which torch begins files of its layout before the zip archives
LEAVES = (str, int, float, type(None), bytes, Tensor)


def unpickled(path: Path) -> Any:
    """What a file of torch's holds, nested as it is. ConfigError for anything damaged, huge, or that asks for code."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            content = _of_zip(path, file) if zipped else _of_legacy(path, file)
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle fails in whatever way its bytes happen to spell
        raise ConfigError(f"{path} was cut short or is damaged ({shown(error, 100)}). Fetch it again.") from error
    check_tree(content, f"{path}", (*LEAVES, Inert, Name))
    return content


def _of_zip(path: Path, file: IO[bytes]) -> Any:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise Damaged("a zip archive, but not of torch's")
    start, size = _span(file, entries[programs[0]])
    if size > PROGRAM:
        raise Damaged(f"{size} bytes beside the tensors")
    folder = programs[0].removesuffix("data.pkl")
    order = entries.get(folder + "byteorder")
    if order is not None and _content(file, *_span(file, order)) != b"little":
        raise Damaged("its numbers are big-endian")
    machine = Machine(path)
    content = machine.run(io.BytesIO(_content(file, start, size)))
    places = {}
    for key in {storage.key for _, storage, *_ in machine.tensors}:
        if (entry := entries.get(f"{folder}data/{key}")) is None:
            raise Damaged(f"the numbers {shown(key)} are missing")
        places[key] = _span(file, entry)
    machine.fill(places)
    return content


def _check_directory(file: IO[bytes]) -> None:
    """Bounds an archive's table of contents before it is read; torch's end with its length and no comment."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 22))
    end = file.read(22)
    if end[:4] != b"PK\x05\x06":
        raise Damaged("the end of the zip archive is missing")
    length = int.from_bytes(end[12:16], "little")
    if length == 0xFFFFFFFF or int.from_bytes(end[16:20], "little") == 0xFFFFFFFF:  # a long one: the record before it
        file.seek(max(0, size - 22 - 20 - 56))
        length = int.from_bytes(file.read(56)[40:48], "little")
    if length > DIRECTORY:
        raise Damaged(f"a table of contents of {length} bytes")


def _span(file: IO[bytes], entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes begin, and how many there are, all inside the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Damaged("its entries are compressed, as torch's never are")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Damaged("an entry is not where the archive says")
    start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + entry.file_size > file.seek(0, os.SEEK_END):
        raise Damaged("an entry is longer than the file")
    return start, entry.file_size


def _content(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _of_legacy(path: Path, file: IO[bytes]) -> Any:
    """The layout before torch 1.6: three small pickles, the content, the storages' keys, then each one's numbers."""
    file.seek(0)
    machine = Machine(path)
    if machine.run(file) != _MAGIC:
        raise Damaged("a pickle, but not of torch's")
    machine.run(file)
    machine.run(file)
    content = machine.run(file)
    keys = machine.run(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Damaged("its storages have no names")
    storages = {storage.key: storage for _, storage, *_ in machine.tensors}
    places, start, end = {}, file.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise Damaged(f"the numbers {shown(key)} are nobody's")
        if int.from_bytes(_content(file, start, 8), "little") != storage.count:
            raise Damaged(f"the numbers {shown(key)} are not as many as it says")
        places[key] = start + 8, storage.count * storage.dtype.itemsize
        start += 8 + places[key][1]
        if start > end:
            raise Damaged("its numbers are longer than the file")
    machine.fill(places)
    return content
