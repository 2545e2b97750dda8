"""Sums and counts of what is logged: exact over micro-batches, ranks and steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

TIME_BINS = 10  # of t in [0, 1]: training losses fall into them, validation stands in their middles


class Totals:
    """(sum, sum of squares, count) for a fixed list of names, so that all ranks reduce the same tensor."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.values = torch.zeros(len(self.names), 3, dtype=torch.float64)

    def add(self, name: str, values: Tensor) -> None:  # (N,)
        v = values.detach().double().cpu()
        self.values[self.names.index(name)] += torch.stack([v.sum(), v.square().sum(), torch.tensor(float(len(v)))])

    def add_by_bin(self, prefix: str, values: Tensor, t: Tensor) -> None:  # (N,), (N,) in [0, 1]
        """One name a bin of t: prefix/0 holds t in [0, 0.1)."""
        bins = (t.cpu() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        for i in bins.unique().tolist():
            self.add(f"{prefix}/{i}", values.cpu()[bins == i])

    def merge(self, other: Totals) -> None:
        self.values += other.values

    def reduce(self) -> None:
        """Sums over all ranks, in place."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.values)

    def means(self) -> dict[str, float]:
        """The mean of every name that has been seen."""
        return {n: (s / c).item() for n, (s, _, c) in zip(self.names, self.values, strict=True) if c > 0}

    def standard_errors(self) -> dict[str, float]:
        """The standard error of those means, where there are at least two values."""
        errors = {}
        for name, (total, square, count) in zip(self.names, self.values.tolist(), strict=True):
            if count > 1:
                variance = max(0.0, (square - total**2 / count) / (count - 1))
                errors[name] = (variance / count) ** 0.5
        return errors

    def reset(self) -> None:
        self.values.zero_()


def bin_times() -> list[float]:
    """The middle of every bin."""
    return [(i + 0.5) / TIME_BINS for i in range(TIME_BINS)]


def binned(prefix: str) -> list[str]:
    return [f"{prefix}/{i}" for i in range(TIME_BINS)]
