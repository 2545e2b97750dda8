"""Where numbers are: on the host, on a device, or cut into shares that processes hold."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Numbers on a device. A GPU fetches the host's when it comes to it: nobody waits."""
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def beside(values: Tensor, like: Tensor) -> Tensor:
    """The same on the device, and in the dtype, of another tensor."""
    return on_device(values, like.device).to(like.dtype)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Within the block products are of the dtype that they are asked in, where autocast would lower them."""
    kind = like.device.type  # the meta device has no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def is_shared(tensor: Tensor) -> bool:
    """Whether this process holds only a share of it (FSDP2's DTensor, which takes half a second to import)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that processes hold shares of: they must ask together. Another one as it is."""
    return tensor.full_tensor() if is_shared(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the same memory."""
    return tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]


def laid_out_like(values: Tensor, like: Any) -> Tensor:
    """A copy as another tensor is: on its device, in its memory layout, and cut into the same shares.

    values: the whole, in every process, or shares like its.
    """
    if not is_shared(like) or is_shared(values):
        return torch.empty_like(like, dtype=values.dtype).copy_(values)
    from torch.distributed.tensor import DTensor

    mesh, rows = like.device_mesh, values.chunk(like.device_mesh.size())
    rank = mesh.get_local_rank()
    mine = (rows[rank] if rank < len(rows) else values[:0]).to(like.device, copy=True)
    return DTensor.from_local(mine, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
