"""Euler's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.churn import Churn
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def euler(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, churn: Churn | None = None) -> Iterator[Step]:
    """Karras et al. 2022, Algorithm 1, with churn 2, of first order."""
    for level, after in pairwise(levels):
        if churn is not None:
            x, level = churn(x, level, levels, noise)
        x0 = denoise(x, level)
        yield (step := Step(level, after, x, x0, levels.euler(level, after, x, x0)))
        x = step.x_next
