"""The header of a .safetensors file, checked before its library maps anything.

8 bytes with the header's length, the header as JSON, the numbers: name -> type, shape, first and last byte.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.untrusted import is_count, parse_json, shown

LONGEST = 16 * 2**20  # bytes; a whole Stable Diffusion's has 200 thousand
_BYTES = {  # of the types that torch's networks are stored in
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


def read(path: Path) -> dict[str, Any]:
    """Every entry by its name, and `__metadata__`. ConfigError where the header and the file do not fit together."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if 8 + length > size:
            raise ConfigError(f"{path} was cut short: its header alone is longer than the file. Fetch it again.")
        if length > LONGEST:
            raise _damaged(path, f"a header of {length} bytes")
        header = parse_json(file.read(length), f"{path}: its header")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "metadata that are no texts")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    spans = sorted(_span(path, name, entry) for name, entry in entries.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _damaged(path, f"{shown(name)} begins at byte {start} where the one before it ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, f"{end} bytes of tensors where there are {size - 8 - length}")
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes begin and end, once they are as many as its type and shape take."""
    said = entry if isinstance(entry, dict) else {}
    kind, shape, span = (said.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in _BYTES:
        raise _damaged(path, f"{shown(name)} of type {shown(kind)}, which is not read here")
    counts: list[Any] = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) else []
    if not isinstance(shape, list) or len(counts) != len(shape) + 2 or len(shape) > 8 or not all(map(is_count, counts)):
        raise _damaged(path, f"{shown(name)} of shape {shown(shape)} at {shown(span)}")
    start, stop = counts[-2:]
    if stop - start != prod(shape) * _BYTES[kind]:
        raise _damaged(path, f"{shown(name)}, {kind} {shown(shape)}, in {stop - start} bytes")
    return start, stop, name


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} was cut short or is damaged: its header says {what}. Fetch it again.")
