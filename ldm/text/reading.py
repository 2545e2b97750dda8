"""Bytes that people call text, and text that is none: read here and nowhere else, and never guessed.

A wrong guess of the encoding would train on garbage, or draw it; so what is not certain is refused by its line.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from ldm.errors import ConfigError

# UTF-32's little-endian mark begins with UTF-16's: the longer ones are tried first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class NotText(ValueError):
    """Bytes that are not text, or a string that holds what no text holds; the message says where and what."""


def decode(data: bytes) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one; else NotText naming the line."""
    mark, encoding = next(((m, name) for m, name in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = len(lines(error.object[: error.start].decode(encoding, "replace")))
        name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise NotText(f"not {name} on line {line} (byte 0x{error.object[error.start]:02x}, {error.reason})") from None
    if "\0" in text:
        line = len(lines(text[: text.index("\0")]))
        raise NotText(
            f"not text: a NUL character on line {line} (UTF-16 without a byte order mark, or no text at all?)"
        )
    return text


def read_text(path: str | Path, what: str) -> str:
    """A text file; ConfigError in one line, beginning with `what` and the path, where it is none."""
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{what}{path}: cannot be read ({error.strerror}).") from None
    except NotText as error:
        raise ConfigError(f"{what}{path}: {error}. Save it as UTF-8.") from None


def lines(text: str) -> list[str]:
    """The lines of a text, ended as Unix, Windows or old Macs end them; at least one.

    str.splitlines would end them at characters too that stand in captions and in JSON (U+0085, U+2028, form feeds).
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def checked(text: str) -> str:
    """The text itself; NotText where it holds surrogates: what Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        odd = ord(text[error.start])
        byte = f"byte 0x{odd - 0xDC00:02x}" if 0xDC80 <= odd <= 0xDCFF else f"U+{odd:04X}"
        raise NotText(f"not UTF-8: {printable(text)[:80]!r} holds {byte} after {error.start} characters") from None
    return text


def printable(text: str) -> str:
    """With the sign for unknown characters in the places of surrogates: for messages and lists."""
    return text.encode("utf-8", "surrogateescape" if _escaped(text) else "replace").decode("utf-8", "replace")


def _escaped(text: str) -> bool:
    return all(0xDC80 <= ord(c) <= 0xDCFF for c in text if 0xD800 <= ord(c) <= 0xDFFF)
