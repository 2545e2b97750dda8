"""DPM-Solver-2 in Karras' coordinates: the midpoint method, deterministic or ancestral."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.ancestral import without_noise
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def dpm2(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, eta: float = 0.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Lu et al. 2022a with r = 1/2, as Crowson (2022) has it: the slope at the geometric mean of sigma.

    Two calls a step, one into sigma = 0. eta 1: each step goes below its level, and fresh noise lifts it there.
    """
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        down, fresh = without_noise(level, after, eta, levels)
        y, position = x / levels.scale(level), levels.position(level)
        slope = (y - x0) / position
        if down.sigma > 0:
            half = levels.at((position * levels.position(down)) ** 0.5)
            y_half = y + (levels.position(half) - position) * slope
            slope = (y_half - denoise(levels.scale(half) * y_half, half)) / levels.position(half)
        y_down = y + (levels.position(down) - position) * slope
        x_next = after.alpha / down.alpha * levels.scale(down) * y_down
        if fresh > 0:
            x_next = x_next + s_noise * fresh * noise(x)
        step = Step(level, after, x, x0, x_next)
        yield step
        x = step.x_next
