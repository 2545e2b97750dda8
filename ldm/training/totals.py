"""Sums and counts of what is logged: exact over micro-batches, ranks and steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.training.distributed import collectives

TIME_BINS = 10  # of t in [0, 1]: training losses fall into them, validation stands in their middles


class Totals:
    """(sum, sum of squares, count) for a fixed list of names, so that all ranks reduce the same tensor.

    What is added stays where it was made until `reduce` reads it: adding never waits for a device.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.values = torch.zeros(len(self.names), 3, dtype=torch.float64)  # of all processes, as far as reduced
        self._waiting: list[list[tuple[Tensor, Tensor]]] = [[]]  # by step: (row of each value, values)

    def add(self, name: str, values: Tensor, valid: Tensor | None = None) -> None:  # (N,), (N,) bool
        """Values of a name; those that are not valid count for nothing, and the device is not asked which they are."""
        row = torch.full((len(values),), self.names.index(name), device=values.device)
        self._waiting[-1].append((row if valid is None else row.where(valid, -1), values.detach()))

    def add_by_bin(self, prefix: str, values: Tensor, t: Tensor) -> None:  # (N,), (N,) in [0, 1]
        """One name a bin of t: prefix/0 holds t in [0, 0.1)."""
        bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        self._waiting[-1].append((self.names.index(f"{prefix}/0") + bins.to(values.device), values.detach()))

    @property
    def steps(self) -> int:
        """How many have ended since the last call of `reduce`."""
        return len(self._waiting) - 1

    def end_step(self) -> None:
        """What is added from here on is another step's."""
        self._waiting.append([])

    def drop_step(self) -> None:
        """Forgets what was added since the last step ended."""
        self._waiting[-1].clear()

    def reduce(self) -> Tensor:
        """(steps, names, 3) float64: the sums over all ranks of each step since the last call; they join `values`.

        The device is waited for once, and the ranks meet once; all must have ended equally many steps. Steps join one
        after another, so that the result is the same, to the last bit, whenever this was called.
        """
        steps, n = self._waiting, len(self.names)
        self._waiting = [[]]
        found = torch.zeros(len(steps) * n, 3, dtype=torch.float64)
        added = [(row + i * n * (row >= 0), values) for i, step in enumerate(steps) for row, values in step]
        if added:
            rows, values = (torch.cat(tensors).cpu() for tensors in zip(*added, strict=True))
            valid = rows >= 0
            rows, v = rows[valid], values[valid].double()  # here, because MPS has no float64
            found.index_add_(0, rows, torch.stack([v, v.square(), torch.ones_like(v)], dim=1))
        collectives.total(found)
        by_step = found.view(len(steps), n, 3)
        for step in by_step:
            self.values += step
        return by_step

    def means(self) -> dict[str, float]:
        """The mean of every name that has been seen."""
        return means(self.names, self.values)

    def standard_errors(self) -> dict[str, float]:
        """The standard error of those means, where there are at least two values."""
        errors = {}
        for name, (total, square, count) in zip(self.names, self.values.tolist(), strict=True):
            if count > 1:
                variance = max(0.0, (square - total**2 / count) / (count - 1))
                errors[name] = (variance / count) ** 0.5
        return errors

    def reset(self) -> None:
        self._waiting = [[]]
        self.values.zero_()


def means(names: Sequence[str], values: Tensor) -> dict[str, float]:  # (names, 3)
    """The mean of every name that has been seen."""
    return {n: s / c for n, (s, _, c) in zip(names, values.tolist(), strict=True) if c > 0}


def bin_times() -> list[float]:
    """The middle of every bin."""
    return [(i + 0.5) / TIME_BINS for i in range(TIME_BINS)]


def binned(prefix: str) -> list[str]:
    return [f"{prefix}/{i}" for i in range(TIME_BINS)]
