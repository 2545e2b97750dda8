"""Ancestral sampling, as DDPM was published."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.levels import Levels, weighted_sum
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
        shrink = (after.sigma / level.sigma) ** 2
        terms = [(ratio * shrink, x), (after.alpha * forward / level.sigma**2, x0)]
        if after.sigma > 0:
            terms.append(((forward * shrink if variance == "small" else forward) ** 0.5, noise(x)))
        yield (step := Step(level, after, x, x0, weighted_sum(*terms)))
        x = step.x_next
