"""Tensors into .safetensors files, one at a time: writing takes the memory of the largest tensor, not of a copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.devices import whole
from ldm.errors import NotFinite

_CODES = {  # in the library's order
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype | None = None,  # of floating tensors; None: as they are
    metadata: Mapping[str, str] | None = None,
    called: str = "",  # before names in messages
) -> None:
    """Writes the bytes that `safetensors.torch.save_file` writes; tensors may share memory or lie on a device.

    Of those that processes hold shares of, one after another is put together, by `gather` in the other processes.

    The layout: 8 bytes with the header's length, the header as JSON padded to 8 bytes, the numbers. Wide types stand
    first, so that all are aligned. Metadata keep their order, which that function's do not. NotFinite for numbers that
    `dtype` cannot hold; with None they are written as they are.
    """
    kinds = _kinds(tensors, dtype)
    names = _order(kinds)
    header: dict[str, object] = {} if not metadata else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _CODES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = whole(tensors[name].detach())
            tensor = (tensor.to("cpu") if dtype is None else cast(tensor, dtype, called + name)).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def is_storable(tensor: Tensor) -> bool:
    """Whether a file can hold it: not sparse or complex ones, and no type that is not known here."""
    return tensor.layout is torch.strided and tensor.dtype in _CODES


def gather(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """What a process does that holds shares of the tensors while the first one writes them with `save_tensors`."""
    for name in _order(_kinds(tensors, dtype)):
        whole(tensors[name].detach())


def _kinds(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """In which type each is written."""
    return {k: dtype if dtype is not None and v.is_floating_point() else v.dtype for k, v in tensors.items()}


def _order(kinds: Mapping[str, torch.dtype]) -> list[str]:
    order = list(_CODES)
    return sorted(kinds, key=lambda name: (order.index(kinds[name]), name))


def finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; of any type, those of one byte too, which know few operations."""
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor on the CPU, floating numbers in `dtype`. NotFinite where they are not finite, or not any more."""
    found = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    if not found.is_floating_point() or finite(found):
        return found
    if not finite(tensor):
        raise NotFinite(
            f"{name} holds NaN or infinities: its training diverged, or its file is damaged. Take another version or "
            "step of the checkpoint."
        )
    short = str(dtype).removeprefix("torch.")
    raise NotFinite(
        f"{name} reaches {tensor.abs().max().item():.3g}, and {short} holds {torch.finfo(dtype).max:.5g} at most: it "
        "would be written as infinite. Use dtype=bfloat16 or dtype=float32."
    )
