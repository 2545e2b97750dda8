"""Sums and counts of what is logged: exact over micro-batches, ranks and steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.training.distributed import processes

TIME_BINS = 10  # of t in [0, 1]: training losses fall into them, validation stands in their middles


class Totals:
    """(sum, sum of squares, count) for a fixed list of names, so that all ranks reduce the same tensor."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self._sums = torch.zeros(len(self.names), 3, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor]] = []  # (row of each value, values), where the values were made

    def add(self, name: str, values: Tensor, valid: Tensor | None = None) -> None:  # (N,), (N,) bool
        """Values of a name; those that are not valid count for nothing, and the device is not asked which they are."""
        row = torch.full((len(values),), self.names.index(name), device=values.device)
        self._waiting.append((row if valid is None else row.where(valid, -1), values.detach()))

    def add_by_bin(self, prefix: str, values: Tensor, t: Tensor) -> None:  # (N,), (N,) in [0, 1]
        """One name a bin of t: prefix/0 holds t in [0, 0.1)."""
        bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        self._waiting.append((self.names.index(f"{prefix}/0") + bins.to(values.device), values.detach()))

    @property
    def values(self) -> Tensor:
        """(names, 3) float64 on the CPU. What was added is copied here at once: a step waits for its device once."""
        if self._waiting:
            rows, values = (torch.cat(tensors).cpu() for tensors in zip(*self._waiting, strict=True))
            valid = rows >= 0
            rows, v = rows[valid], values[valid].double()  # here, because MPS has no float64
            self._waiting.clear()
            self._sums.index_add_(0, rows, torch.stack([v, v.square(), torch.ones_like(v)], dim=1))
        return self._sums

    def merge(self, other: Totals) -> None:
        self.values.add_(other.values)

    def reduce(self) -> None:
        """Sums over all ranks, in place."""
        processes.total(self.values)

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
        self._waiting.clear()
        self._sums.zero_()


def bin_times() -> list[float]:
    """The middle of every bin."""
    return [(i + 0.5) / TIME_BINS for i in range(TIME_BINS)]


def binned(prefix: str) -> list[str]:
    return [f"{prefix}/{i}" for i in range(TIME_BINS)]
