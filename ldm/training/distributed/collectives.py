"""Every exchange of ours in which all processes take part, and no other file of this package has one.

They carry host tensors over a gloo group of our own, which works whatever the training's group can carry (NCCL's has
nothing for host tensors), and never waits for a device. What libraries exchange goes through the default group, as
does `total_on_device`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.training.distributed import processes

_host: tuple[Any, Any] | None = None  # the default group, and ours beside it


def total(values: Tensor) -> None:
    """Sums a host tensor over all processes, in place."""
    if (ours := _host_group()) is not None:
        dist.all_reduce(values, group=ours)


def total_on_device(values: Tensor) -> None:
    """Sums a tensor where training computes over all processes, in place; the host does not wait for it."""
    if size() > 1:
        processes.arrived()
        dist.all_reduce(values)


def highest(value: int) -> int:
    """The largest of all processes' numbers."""
    if (ours := _host_group()) is None:
        return value
    held = torch.tensor(value)
    dist.all_reduce(held, op=dist.ReduceOp.MAX, group=ours)
    return int(held)


def joined(values: Tensor, first: int, count: int) -> Tensor:
    """(count, ...) host rows in all processes, of which this one has those from `first` on, and no other has them."""
    whole = values.new_zeros((count, *values.shape[1:]))
    own = whole[first : first + len(values)]
    own.copy_(values[: len(own)])
    total(whole)
    return whole


def every(values: Tensor) -> list[Tensor]:
    """A tensor of each process in all of them, on the host; their first dimensions may differ, or be empty."""
    if size() == 1:
        return [values]
    held = values.detach().cpu()
    shape = held.shape[1:]  # of a row; a process without any is told by the others
    rows = held.reshape(1, 1) if held.ndim == 0 else held.reshape(len(held), math.prod(shape))
    lengths = joined(torch.tensor([len(rows)]), rank(), size()).tolist()
    width = highest(rows.shape[1] if len(rows) else 0)
    if not len(rows):
        rows, shape = rows.new_zeros(0, width), torch.Size([width] if width > 1 else [])
    parts = joined(rows, sum(lengths[: rank()]), sum(lengths)).split(lengths)
    return [part.reshape(()) if held.ndim == 0 else part.reshape(len(part), *shape) for part in parts]


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if size() > 1 else 0


def _host_group() -> Any:
    global _host
    if size() == 1:
        return None
    processes.arrived()
    default = dist.group.WORLD
    if _host is None or _host[0] is not default:
        _host = (default, dist.new_group(backend="gloo"))
    return _host[1]
