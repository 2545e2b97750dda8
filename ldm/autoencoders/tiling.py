"""Pictures larger than memory, through the autoencoder tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

TILE = 64  # of the latent, a side: 512 pixels at factor 8
OVERLAP = 16


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, scale: Fraction, tile: int, overlap: int
) -> Tensor:  # (B,C,H,W) -> (B,C',H scale,W scale)
    """`function` on overlapping tiles, blended linearly where they overlap. Not what the whole gives: each tile sees
    its own neighbourhood only, in GroupNorm and attention too.

    tile, overlap: of x, both multiples of 1/scale where that is whole.
    """
    height, width = x.shape[-2:]
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    total: Tensor | None = None
    weights: Tensor | None = None
    for top in rows:
        for left in columns:
            part = function(x[..., top : top + tile, left : left + tile])
            if total is None or weights is None:
                shape = (*part.shape[:2], int(height * scale), int(width * scale))
                total, weights = part.new_zeros(shape), part.new_zeros((1, 1, *shape[2:]))
            h, w = part.shape[-2:]
            ramp = _ramp(h, int(overlap * scale), part)[:, None] * _ramp(w, int(overlap * scale), part)[None]
            place = (
                ...,
                slice(int(top * scale), int(top * scale) + h),
                slice(int(left * scale), int(left * scale) + w),
            )
            total[place] += ramp * part
            weights[place] += ramp
    assert total is not None and weights is not None
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: the last one ends at the edge, neighbours share at least `overlap`."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    """1 in the middle, falling linearly, never to 0, over `overlap` at both ends."""
    distance = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(distance, distance.flip(0)).clamp(max=max(1, overlap)) / max(1, overlap)
