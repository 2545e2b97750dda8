"""Files that somebody else wrote, as plain data: nothing is run, resolved or imported, and sizes are bounded first.

JSON and YAML here; tensors in `ldm.formats.files.open`, by the same rules.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from ldm.errors import ConfigError

SETTINGS = 4 * 2**20  # bytes of a file of settings at most: published ones have a few thousand
VOCABULARY = 32 * 2**20  # of a tokenizer's: CLIP's have 2 million
DEEPEST = 64  # levels of lists and mappings in one another
LARGEST = 2**20  # numbers and texts that a file holds, shared parts counted wherever they stand


def place(path: Path) -> Literal["file", "folder", "nothing"]:
    """What is at a path. ConfigError where that cannot be told, and for pipes and devices, which may never end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(path, 200)} cannot be read ({_reason(error)}): give another path.") from error
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is a pipe or a device, not a file: give a file.")
    return "file"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within the block a file is read. ConfigError before it for what is no file, and for whatever reading meets."""
    if (found := place(path)) != "file":
        kind = "missing" if found == "nothing" else "a folder"
        raise ConfigError(f"{path} is {kind}, and a file belongs there: fetch it again.")
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({_reason(error)}).") from error


@contextmanager
def interpreted(what: str) -> Iterator[None]:
    """Within the block names and shapes out of a file are taken for what they should be.

    ConfigError, opened by `what`, where they are not: a damaged file fails in whatever way its content spells.
    """
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{what} cannot be read ({_reason(error)}): give another path.") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{what} is not what it says ({type(error).__name__}: {shown(error, 120)}): it is damaged, or of a "
            "kind that is not read. Fetch it again."
        ) from error


def read_bytes(path: Path, most: int = SETTINGS) -> bytes:
    """A file's content. ConfigError when it is no file, cannot be read, or is larger than `most`."""
    try:
        # Without waiting: who opens a pipe otherwise waits for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{path} is a folder, a pipe or a device, and a file belongs there: fetch it again.")
            if found.st_size > most:
                raise ConfigError(
                    f"{path} has {found.st_size / 2**20:.0f} MiB, and files of its kind have {most // 2**20} at most: "
                    "it is not what it says. Fetch it again."
                )
            return file.read(most)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: fetch the whole folder again.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({_reason(error)}).") from error


def read_text(path: Path, most: int = SETTINGS) -> str:
    """A text in UTF-8, with or without a byte order mark. Errors as `read_bytes`'."""
    return _decoded(read_bytes(path, most), f"{path}")


def read_json(path: Path, most: int = SETTINGS, infinite: bool = False) -> dict[str, Any]:
    """A JSON object. ConfigError in one line for whatever else the file holds."""
    return parse_json(read_bytes(path, most), f"{path}", infinite)


def parse_json(text: str | bytes, what: str, infinite: bool = False) -> dict[str, Any]:
    """A JSON object out of a text; `what` opens the message of the ConfigError for anything else.

    Stricter than json.loads, so that all readers see the same: a key stands once, NaN and infinities are no numbers.
    infinite: -Infinity is one, as diffusers writes it for `lambda_min_clipped` of its schedulers.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if data.count(b"[") + data.count(b"{") > LARGEST or data.count(b",") > 4 * LARGEST:
        raise ConfigError(f"{what} holds more than {LARGEST} lists: it is not what it says. Fetch it again.")
    decoded = _decoded(data, what)
    constant = (lambda name: -math.inf if name == "-Infinity" else _no_number(name)) if infinite else _no_number
    try:
        found = json.loads(decoded, object_pairs_hook=once, parse_constant=constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{what} is not JSON ({shown(error, 120)}): it was cut short or edited. Fetch it again."
        ) from error
    check_tree(found, what)
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is no JSON object but a {type(found).__name__}: it was edited. Fetch it again.")
    return found


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl, none where there is no file; lines that are none, as a killed process leaves, are passed
    over."""
    text = path.read_text(encoding="utf-8", errors="replace") if place(path) == "file" else ""
    for line in text.split("\n"):  # not splitlines: a caption may hold U+2028
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain data. ConfigError in one line for tags, bombs and whatever else the file holds."""
    what, text = f"{path}", read_text(path, SETTINGS // 4)
    try:
        _check_nesting(text, what)
        found = yaml.load(text, _PlainLoader)
    except ConfigError:
        raise
    except Exception as error:  # a damaged document fails in whatever way its bytes happen to spell
        where = getattr(error, "problem_mark", None)
        said = shown(getattr(error, "problem", None) or error, 120)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{what} is not plain YAML ({said}{line}). Fetch it again.") from error
    check_tree(found, what)
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is no YAML mapping but a {type(found).__name__}: it was edited. Fetch it again.")
    return found


def check_tree(value: Any, what: str, leaves: tuple[type, ...] = (str, int, float, type(None))) -> None:
    """ConfigError unless `value` is a tree of mappings, lists, tuples and `leaves`, neither deep nor large.

    A part that stands in several places counts as often: who walks through it meets it as often. One that stands in
    itself is deeper than any bound.
    """
    measured: dict[int, tuple[int, int]] = {}  # by identity: size and height, of what all is known of

    def walk(node: Any, depth: int) -> tuple[int, int]:
        if id(node) in measured:
            size, height = measured[id(node)]
        else:
            children = _children(node, what, leaves)
            if children and depth == DEEPEST:
                raise ConfigError(f"{what} nests deeper than {DEEPEST} levels, or in itself: it is not what it says.")
            size, height = 1, 0
            for child in children:
                more, below = walk(child, depth + 1) if isinstance(child, Mapping | list | tuple) else _leaf(child)
                size, height = size + more, max(height, below + 1)
                if size > LARGEST:
                    raise ConfigError(f"{what} holds more than {LARGEST} values: it is not what it says.")
            measured[id(node)] = size, height
        if depth + height > DEEPEST:
            raise ConfigError(f"{what} nests deeper than {DEEPEST} levels: it is not what it says.")
        return size, height

    def _leaf(node: Any) -> tuple[int, int]:
        _children(node, what, leaves)
        return 1, 0

    walk(value, 0)


def shown(value: Any, most: int = 60) -> str:
    """A value out of a file for a message: one line, printable, cut."""
    text = value if isinstance(value, str) else repr(value) if isinstance(value, list | dict) else str(value)
    text = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def whole(value: Any, key: str, where: str, least: int = 1, most: int = 2**20) -> int:
    """A whole number of a file's, between bounds that no model comes near. `where` opens the message."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(
            f"{where} says {key}={shown(value)}: a whole number from {least} to {most} belongs there. Fetch it again."
        )
    return value


def is_count(value: Any) -> bool:
    """Whether it may count bytes or numbers in a file: a whole number, and no larger than files are."""
    return type(value) is int and 0 <= value < 2**48


def number(value: Any, key: str, where: str, least: float, most: float) -> float:
    """A number of a file's, between bounds. `where` opens the message."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(
            f"{where} says {key}={shown(value)}: a number from {least:g} to {most:g} belongs there. Fetch it again."
        )
    return float(value)


def _children(node: Any, what: str, leaves: tuple[type, ...]) -> list[Any]:
    if isinstance(node, Mapping):
        if not all(isinstance(key, str | int | float | type(None)) for key in node):
            raise ConfigError(f"{what} has keys that are no texts: it is not what it says.")
        return [*(key for key in node if isinstance(key, str) and not key.isascii()), *node.values()]
    if isinstance(node, list | tuple):
        return list(node)
    if not isinstance(node, leaves):
        raise ConfigError(f"{what} holds a {type(node).__name__}, which is no plain data: it is not what it says.")
    if isinstance(node, str) and not node.isascii():
        try:
            node.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{what} holds half a character (a lone surrogate): fetch it again.") from error
    return []


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is no text in UTF-8 (byte {error.start}): fetch it again.") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of JSON whose keys are there once; ValueError names the one that is not."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _check_nesting(text: str, what: str) -> None:
    """ConfigError before libyaml's composer recurses: it has no bound, and ends the process."""
    depth = 0
    for event in yaml.parse(text, _Safe):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{what} nests deeper than {DEEPEST} levels: it is not what it says.")


_Safe: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class _PlainLoader(_Safe):
    """YAML's safe loader without what multiplies (merge keys, numbers of any length) and what hides (keys twice)."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys are not read", node.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)

    def short(self, node: Any) -> Any:
        if len(node.value) > 64:
            raise yaml.constructor.ConstructorError(None, None, "a number has more than 64 digits", node.start_mark)
        integer = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.short)
