"""The naive loop: take the predicted noise away, add a part of it back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels, weighted_sum
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def add_back(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, ratio: float = 0.9) -> Iterator[Step]:
    """y <- x0 + ratio (y - x0) with y = x/alpha; the last step is the jump to x0.

    The network is told that sigma/alpha shrinks by `ratio` too, so `levels` must be `geometric` with the same ratio.
    That makes every step but the last one of Euler's.
    """
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        kept = ratio if after.sigma > 0 else 0.0
        x_next = weighted_sum((kept * after.alpha / level.alpha, x), ((1 - kept) * after.alpha, x0))
        yield (step := Step(level, after, x, x0, x_next))
        x = step.x_next
