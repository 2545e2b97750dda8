"""DPM-Solver++ SDE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.levels import Levels, floats, weighted_sum
from ldm.diffusion.samplers.ddim import renoised
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def dpmpp_sde(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Crowson 2022: an ancestral step to the geometric mean of sigma/alpha, whose x0 then makes the whole step.

    Both draws of a step lie on one Brownian path in sigma/alpha: independent ones give too narrow pictures. Two calls a
    step, one where there is no half-way: into sigma = 0 and from alpha = 0.
    """
    means = [(level.ratio * after.ratio) ** 0.5 for level, after in pairwise(levels)]
    halves = floats(levels.scheduler.level_at(torch.tensor(means, dtype=torch.float64)))
    for (level, after), half in zip(pairwise(levels), halves, strict=True):
        x0 = denoise(x, level)
        if after.sigma == 0 or level.alpha == 0:
            x_next = renoised(x, x0, level, after, eta, s_noise * noise(x) if after.sigma > 0 else None)
        else:
            shared = (level.ratio - half.ratio) / (level.ratio - after.ratio)  # of the path's variance
            to_half = s_noise * noise(x)
            x_half = renoised(x, x0, level, half, eta, to_half)
            whole = weighted_sum((shared**0.5, to_half), ((1 - shared) ** 0.5 * s_noise, noise(x)))
            x_next = renoised(x, denoise(x_half, half), level, after, eta, whole)
        yield (step := Step(level, after, x, x0, x_next))
        x = step.x_next
