"""Ancestral sampling, as DDPM was published."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def ddpm(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, variance: Literal["small", "large"] = "small"
) -> Iterator[Step]:
    """Ho et al. 2020, Equations 6 and 7, for any alpha and sigma.

    The variance is the posterior's ("small", right for data of variance 0) or the forward step's ("large", right for
    data of variance 1). No noise is added into sigma = 0.
    """
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        ratio = level.alpha / after.alpha
        forward = max(level.sigma**2 - (ratio * after.sigma) ** 2, 0.0)  # variance of x_t given x_next
        mean = ratio * (after.sigma / level.sigma) ** 2 * x + after.alpha * forward / level.sigma**2 * x0
        chosen = forward * (after.sigma / level.sigma) ** 2 if variance == "small" else forward
        x_next = mean + chosen**0.5 * noise(x) if after.sigma > 0 else mean
        step = Step(level, after, x, x0, x_next)
        yield step
        x = step.x_next
