"""DDIM, from the deterministic ODE (eta 0) to ancestral sampling (eta 1)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def ddim(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """Song et al. 2021, Equations 12 and 16, for any alpha and sigma."""
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        eps = (x - level.alpha * x0) / level.sigma
        # The variance left when x_t is known to come from x_next; rounding must not make it negative.
        left = max(level.sigma**2 - (level.alpha * after.sigma / after.alpha) ** 2, 0.0)
        fresh = eta * after.sigma / level.sigma * left**0.5
        x_next = after.alpha * x0 + (after.sigma**2 - fresh**2) ** 0.5 * eps
        if eta > 0:
            x_next = x_next + fresh * noise(x)
        step = Step(level, after, x, x0, x_next)
        yield step
        x = step.x_next
