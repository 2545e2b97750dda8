"""Multistep consistency sampling, for models distilled to jump."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels, weighted_sum
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def lcm(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, sigma_data: float = 0.5, scaling: float = 10.0
) -> Iterator[Step]:
    """Luo et al. 2023: jump to x0, add the next level's noise. For ordinary models it is too narrow: fresh noise only.

    The jump is blended with x_t by c_skip and c_out of `scaling` times the timestep (Song et al. 2023, Equation 5).
    """
    for level, after in pairwise(levels):
        time = scaling * level.timestep
        spread = time**2 + sigma_data**2
        x0 = weighted_sum((sigma_data**2 / spread, x), (time / spread**0.5, denoise(x, level)))
        x_next = weighted_sum((after.alpha, x0), (after.sigma, noise(x))) if after.sigma > 0 else x0
        yield (step := Step(level, after, x, x0, x_next))
        x = step.x_next
