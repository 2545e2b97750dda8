"""DPM-Solver-2 in Karras' coordinates: the midpoint method, deterministic or ancestral."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.levels import Levels, floats, weighted_sum
from ldm.diffusion.samplers.ancestral import without_noise
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def dpm2(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, eta: float = 0.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Lu et al. 2022a with r = 1/2, as Crowson (2022) has it: the slope at the geometric mean of sigma.

    Two calls a step, one into sigma = 0. eta 1: each step goes below its level, and fresh noise lifts it there.
    """
    downs = without_noise(levels, eta)
    ends = [(levels.position(level), levels.position(down)) for level, (down, _) in zip(levels, downs, strict=False)]
    means = torch.tensor([(start * end) ** 0.5 for start, end in ends], dtype=torch.float64)
    halves = floats(levels.at(means))
    for (level, after), (down, fresh), half in zip(pairwise(levels), downs, halves, strict=True):
        x0 = denoise(x, level)
        scale = levels.scale(down) * after.alpha / down.alpha
        if down.sigma > 0:
            x_half = levels.euler(level, half, x, x0)
            # y + h slope, the slope (y_half - x0_half)/position half-way.
            h = scale * (levels.position(down) - levels.position(level)) / levels.position(half)
            terms = [(scale / levels.scale(level), x), (h / levels.scale(half), x_half), (-h, denoise(x_half, half))]
        else:
            terms = [(scale, x0)]
        if fresh > 0:
            terms.append((s_noise * fresh, noise(x)))
        yield (step := Step(level, after, x, x0, weighted_sum(*terms)))
        x = step.x_next
