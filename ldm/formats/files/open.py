"""Tensors out of files without running what the files may hold: safetensors, and torch's pickles as plain data.

Files are told apart by their first bytes, never by their names. Both kinds are mapped into memory: a tensor takes none
before its numbers are touched, and `page_out` gives back what it took.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import ConfigError
from ldm.formats.files import safetensors_header, torch_file
from ldm.untrusted import readable, shown


@dataclass(frozen=True)
class Opened:
    """A file's tensors as they are stored (read when they are touched), and what else it says."""

    tensors: dict[str, Tensor]
    names: tuple[str, ...]  # of all entries, those that are no tensors too
    metadata: dict[str, str]  # of safetensors files
    global_step: int | None = None  # of torch files


def load(path: Path) -> Opened:
    """Opens a .safetensors, .ckpt, .pt or .bin file. ConfigError for anything that is damaged or would run code."""
    with readable(path):
        return _safetensors(path) if _is_safetensors(path) else _torch(path)


def load_nested(path: Path) -> dict[Any, Any]:
    """What a file holds, nested as it is: tensors, numbers and texts in dicts, lists and tuples. Errors as `load`'s."""
    with readable(path):
        return dict(_safetensors(path).tensors if _is_safetensors(path) else _unpickled(path))


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, else torch's; ConfigError for files of any other kind."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ConfigError(f"{path} is empty: fetch it again.")
    if start[8:9] == b"{":
        return True
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return False
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start[:16]):
        line = start.decode("latin-1").splitlines()[0]
        raise ConfigError(
            f"{path} holds text, not tensors (it begins '{line[:40]}'): a download's error page or a Git LFS pointer "
            "looks like this. Fetch the file itself."
        )
    raise ConfigError(
        f"{path} is neither a safetensors nor a torch file. Give a .safetensors or .ckpt file, or a folder."
    )


def float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, contiguous: half precision is for files."""
    return tensor.detach().to(torch.float32).contiguous()


_PAGE_OUT = 21  # Linux' MADV_PAGEOUT, which Python's mmap does not name


def page_out(tensor: Tensor) -> None:
    """Gives a mapped tensor's memory back; its numbers are read again when they are touched again.

    The kernel does so by itself when memory runs short. Asking keeps the peak of a walk over large files at the tensors
    in hand. Numbers in ordinary memory stay where they are; systems other than Linux (5.4) ignore it.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages inside the tensor
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and tensor.is_contiguous() and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _PAGE_OUT)


def _safetensors(path: Path) -> Opened:
    header = safetensors_header.read(path)
    metadata = header.pop("__metadata__", {})
    try:
        with safe_open(path, framework="pt") as file:
            return Opened({name: file.get_tensor(name) for name in header}, tuple(header), metadata)
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path} was cut short or is damaged ({shown(error, 120)}). Fetch it again.") from error


def _unpickled(path: Path) -> Mapping[Any, Any]:
    content = torch_file.unpickled(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not named tensors: it is no checkpoint.")
    return content


_NESTED = ("state_dict", "model_state_dict", "module", "model")  # under which trainers keep a model's tensors


def _torch(path: Path) -> Opened:
    content = _unpickled(path)
    step = content.get("global_step")
    top = tuple(str(name) for name in content)
    while inner := next((content[k] for k in _NESTED if isinstance(content.get(k), Mapping)), None):
        content = inner
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return Opened(
        tensors, tuple(dict.fromkeys([*top, *map(str, content)])), {}, step if isinstance(step, int) else None
    )
