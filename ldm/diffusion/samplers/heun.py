"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.churn import Churn
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def heun(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, churn: Churn | None = None) -> Iterator[Step]:
    """Karras et al. 2022, Algorithm 1, with churn 2: two calls a step, the last one Euler's. Step.x0 is the first's."""
    for level, after in pairwise(levels):
        if churn is not None:
            x, level = churn(x, level, levels, noise)
        x0 = denoise(x, level)
        y, h = x / levels.scale(level), levels.position(after) - levels.position(level)
        slope = (y - x0) / levels.position(level)
        y_next = y + h * slope
        if after.sigma > 0:
            x0_after = denoise(levels.scale(after) * y_next, after)
            slope_after = (y_next - x0_after) / levels.position(after)
            y_next = y + h * (slope + slope_after) / 2
        step = Step(level, after, x, x0, levels.scale(after) * y_next)
        yield step
        x = step.x_next
