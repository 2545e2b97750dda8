"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels, weighted_sum
from ldm.diffusion.samplers.churn import Churn
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def heun(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, churn: Churn | None = None) -> Iterator[Step]:
    """Karras et al. 2022, Algorithm 1, with churn 2: two calls a step, the last one Euler's. Step.x0 is the first's."""
    for level, after in pairwise(levels):
        if churn is not None:
            x, level = churn(x, level, levels, noise)
        x0 = denoise(x, level)
        x_next = levels.euler(level, after, x, x0)
        if after.sigma > 0:
            # y + h (slope + slope_after)/2, where y + h slope is Euler's and h slope_after = r (y - x0) there.
            x0_after, r = denoise(x_next, after), 1 - levels.position(level) / levels.position(after)
            half = levels.scale(after) / 2
            x_next = weighted_sum((half / levels.scale(level), x), ((1 + r) / 2, x_next), (-r * half, x0_after))
        yield (step := Step(level, after, x, x0, x_next))
        x = step.x_next
