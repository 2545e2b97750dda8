"""What one optimizer step saw of a codebook: who was nearest to which code, over micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.devices import on_device


@dataclass(frozen=True)
class Step:
    """Sums over a step of all processes. counts (K,); sums (K,C), of the z of each code; candidates (K,C), an
    encoder's output for each code. None: nobody asked. finite (): whether all z of the step were numbers."""

    counts: Tensor
    sums: Tensor | None
    candidates: Tensor | None
    finite: Tensor


class Tally:
    """Keeps a step's z, where they stand in the global batch, and the indices of their codes.

    No buffers: those are copied from the first process into the others before each micro-batch, and a step that was
    begun is not saved.
    """

    def __init__(self) -> None:
        self._micro: list[tuple[Tensor, Tensor, int]] = []  # z, indices, the first sample's place
        self._place: range | None = None
        self._total: int | None = None

    def begin_batch(self, positions: range, total: int) -> None:
        self._place, self._total = positions, total

    def add(self, z: Tensor, indices: Tensor) -> None:  # (B,C,h,w), (B,h,w)
        """Without `begin_batch` a micro-batch stands behind the one before it, and there are no other processes."""
        first = self._place.start if self._place is not None else sum(len(z) for z, _, _ in self._micro)
        self._micro.append((z.detach(), indices, first))

    def close(self, size: int, summed: Callable[[Tensor], None], sums: bool, candidates: int | None) -> Step | None:
        """The step, which is over then; None where nothing was added. All processes call it, and exchange once.

        size: K; sums: whether they are asked for; candidates: the seed of their places, None: not asked for.
        """
        micro, total = self._micro, self._total
        self._micro, self._place, self._total = [], None, None
        if not micro:
            return None
        (_, channels, *area), device = micro[0][0].shape, micro[0][0].device
        width = 1 + channels * sums
        table = torch.zeros(size, width + channels * (candidates is not None), device=device)
        samples = total if total is not None else sum(len(z) for z, _, _ in micro)
        drawn = None if candidates is None else drawn_places(size, samples * math.prod(area), candidates)
        places = None if drawn is None else on_device(drawn, device)
        for z, indices, first in micro:
            pixels = rearrange(z.float(), "b c h w -> (b h w) c")
            ones = torch.ones_like(pixels[:, :1]) + 0 * pixels.sum()  # NaN where a z is no number
            counted = torch.cat([ones, pixels], dim=1) if sums else ones
            table[:, :width] += sums_by_code(counted, indices.flatten(), size)
            if places is not None:
                table[:, width:] += _held(pixels, places - first * math.prod(area))
        summed(table)
        return Step(
            counts=table[:, 0],
            sums=table[:, 1:width] if sums else None,
            candidates=table[:, width:] if candidates is not None else None,
            finite=table.isfinite().all(),
        )


def sums_by_code(values: Tensor, codes: Tensor, size: int) -> Tensor:  # (N,C), (N,) -> (size,C)
    """The sum of each code's rows: an embedding's backward pass, in a fixed order, where a GPU's index_add has none."""
    with torch.enable_grad():
        table = torch.zeros(size, values.shape[1], device=values.device, requires_grad=True)
        (sums,) = torch.autograd.grad(F.embedding(codes, table), table, values)
    return sums


def drawn_places(size: int, pixels: int, seed: int) -> Tensor:  # -> (size,) int64 in [0, pixels), on the host
    """A pixel of the global batch for each code, each of a stratum of its own: all different where there are enough."""
    generator = torch.Generator().manual_seed(seed)
    strata = torch.randperm(size, generator=generator).double()
    u = torch.rand(size, dtype=torch.float64, generator=generator)
    return ((strata + u) * (pixels / size)).long().clamp(max=pixels - 1)


def _held(pixels: Tensor, rows: Tensor) -> Tensor:  # (N,C), (K,) -> (K,C)
    """The rows that are among these, and 0 for those that another micro-batch or process has."""
    inside = (rows >= 0) & (rows < len(pixels))
    return torch.where(inside[:, None], pixels[rows.clamp(0, len(pixels) - 1)], 0.0)
