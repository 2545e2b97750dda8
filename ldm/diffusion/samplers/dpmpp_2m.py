"""DPM-Solver++(2M)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def dpmpp_2m(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise) -> Iterator[Step]:
    """Lu et al. 2022b, Algorithm 2: second order from the previous x0, first order into sigma = 0."""
    previous: tuple[Tensor, float] | None = None  # x0 and h of the step before
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        h = float(after.log_snr - level.log_snr) / 2
        corrected = x0
        if previous is not None and after.sigma > 0:
            # h_before is infinite after a start from alpha = 0: the correction is then 0.
            x0_before, h_before = previous
            corrected = x0 + h / (2 * h_before) * (x0 - x0_before)
        # exp(-h) written as a quotient: finite at alpha = 0 and at sigma = 0.
        shrink = after.sigma * level.alpha / level.sigma
        x_next = after.sigma / level.sigma * x + (after.alpha - shrink) * corrected
        step = Step(level, after, x, x0, x_next)
        yield step
        previous, x = (x0, h), step.x_next
