"""A strict reader of tar headers: every damage that tarfile and webdataset pass over in silence is an error here.

Measured on webdataset 1.0.2: a shard cut at a header, or with a damaged header in the middle, simply ends there and
nobody hears of the rest. So we walk the 512-byte headers ourselves, once, and keep the offsets.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm.errors import ConfigError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = b"0\0" + b"7"
_MAX_META = 1 << 20  # a long name or pax record above 1 MiB is an attack or noise


class Member(NamedTuple):
    """A regular file in a tar: where its bytes lie."""

    name: str
    offset: int
    size: int


def damaged(path: Path, what: str, remedy: str = "") -> ConfigError:
    """The error for a shard that cannot be trusted: file, reason, remedy."""
    return ConfigError(
        f"{path}: {what}. {remedy or 'Download or make this shard again, or remove it from the folder.'}"
    )


def scan(path: Path) -> tuple[list[Member], str]:
    """The regular members of a tar in order, and a digest of its headers; raises ConfigError at any damage."""
    digest = hashlib.sha256()
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    try:
        total = os.fstat(fd).st_size
        members = list(_walk(fd, total, path, digest))
    finally:
        os.close(fd)
    return members, digest.hexdigest()


def _walk(fd: int, total: int, path: Path, digest: "hashlib._Hash") -> Iterator[Member]:
    position, last, long_name, pax = 0, "", "", dict[str, str]()
    while True:
        header = os.pread(fd, BLOCK, position)
        if len(header) < BLOCK:
            raise _cut(path, fd, position, len(header), last)
        if header == _ZEROS:
            return _end(fd, position, total, path, last)
        if not _checksum_holds(header):
            raise _not_a_header(path, fd, position, last)
        digest.update(header)
        kind, offset = header[156:157], position + BLOCK
        size = int(pax["size"]) if pax.get("size", "").isdigit() else _number(header[124:136], path, position)
        name = pax.get("path") or long_name or _name(header, path, position)
        if offset + size > total:
            raise damaged(
                path, f"member {name!r} says {size} bytes, but the file ends {total - offset} bytes after it starts"
            )
        position = offset + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x", b"g", b"K"):
            raw = _meta(fd, offset, size, path)
            digest.update(raw)
            if kind == b"L":
                long_name = _text(raw.rstrip(b"\0"), path, offset)
            elif kind == b"x":
                pax = _pax(raw, path)
            elif kind == b"g" and {"path", "size"} & _pax(raw, path).keys():
                raise damaged(path, "a global pax header renames all members", "Pack the shard again with GNU tar.")
            continue
        last, long_name, pax = name, "", {}
        if kind in (b"1", b"2"):
            raise damaged(path, f"member {name!r} is a link", "Pack the shard again with links followed (tar -h).")
        if kind == b"S" or kind not in (b"0", b"\0", b"7", b"5"):
            raise damaged(
                path, f"member {name!r} is of type {kind!r}, not a plain file", "Pack it again as plain files."
            )
        if kind == b"5" or name.endswith("/"):
            continue  # folders carry no data
        yield Member(name, offset, size)


def _end(fd: int, position: int, total: int, path: Path, last: str) -> None:
    """An archive ends with two blocks of zeros and nothing after them."""
    if len(os.pread(fd, 2 * BLOCK, position)) < 2 * BLOCK:
        raise damaged(path, f"the end-of-archive mark after {last!r} is incomplete: the file was cut")
    while position < total:
        chunk = os.pread(fd, 1 << 20, position)
        if chunk.strip(b"\0"):
            raise damaged(
                path,
                f"there is data after the end-of-archive mark (after {last!r}): two archives in one file?",
                "Readers stop at the mark and lose the rest; keep one archive a file.",
            )
        position += len(chunk)


def _cut(path: Path, fd: int, position: int, got: int, last: str) -> ConfigError:
    if position == 0:
        return _not_a_header(path, fd, 0, "") if got else damaged(path, "is empty (0 bytes)")
    return damaged(path, f"the end-of-archive mark is missing after {last!r} (byte {position}): the file was cut")


def _not_a_header(path: Path, fd: int, position: int, last: str) -> ConfigError:
    if position:
        return damaged(path, f"bad header checksum at byte {position}, after {last!r}: the file is damaged there")
    start = os.pread(fd, 64, 0).lstrip()
    if start[:2] == b"\x1f\x8b" or start[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9") or start[:5] == b"\xfd7zXZ":
        return damaged(
            path, "is compressed; random access needs a plain tar", f"Unpack it: gunzip {path} (or zstd -d)."
        )
    if start[:1] == b"<":
        return damaged(path, "is a web page (HTML or XML), not a tar: the download was refused?")
    return damaged(path, "is not a tar")


def _checksum_holds(header: bytes) -> bool:
    field = header[148:156].strip(b" \0")
    try:
        return int(field, 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes, path: Path, position: int) -> int:
    if field[0] & 0x80:  # GNU's base-256, for members above 8 GiB
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise damaged(path, f"the header at byte {position} has no readable size") from None


def _name(header: bytes, path: Path, position: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name, path, position)


def _text(name: bytes, path: Path, position: int) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged(
            path, f"the member name {name!r} at byte {position} is not UTF-8", "Rename it and pack again."
        ) from None


def _meta(fd: int, offset: int, size: int, path: Path) -> bytes:
    if size > _MAX_META:
        raise damaged(path, f"a name record at byte {offset} has {size} bytes")
    return os.pread(fd, size, offset)


def _pax(raw: bytes, path: Path) -> dict[str, str]:
    """Records are "length key=value\\n", the length counting itself."""
    records, rest = {}, raw.rstrip(b"\0")
    while rest:
        length, _, tail = rest.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(rest):
            raise damaged(path, f"unreadable pax record {rest[:40]!r}")
        key, _, value = tail[: int(length) - len(length) - 2].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        rest = rest[int(length) :]
    if any(key.startswith("GNU.sparse") for key in records):
        raise damaged(path, "holds sparse members", "Pack it again without --sparse.")
    return records


def header(name: str, size: int) -> bytes:
    """A ustar header that depends on name and size alone (mtime, uid, gid 0): the same samples make the same bytes."""
    raw = name.encode("utf-8")
    if len(raw) > 100:
        raise ConfigError(
            f"the member name {name!r} is longer than the 100 bytes that a tar header holds; shorten the key."
        )
    if size >= 8**11:
        raise ConfigError(f"{name}: {size} bytes do not fit a tar header (8 GiB at most).")
    parts = (raw.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"%011o\0" % 0)
    block = b"".join(parts) + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
    block = block.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> bytes:
    """The zeros that fill a member's last block."""
    return bytes(-size % BLOCK)
