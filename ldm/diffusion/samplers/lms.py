"""Linear multistep on the probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def lms(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, order: int = 4) -> Iterator[Step]:
    """Adams-Bashforth on uneven steps: the polynomial through the last slopes, integrated over the step.

    The sampler of Crowson's k-diffusion (2022) that Stable Diffusion's first releases used; order 1 to 4.
    """
    slopes: list[Tensor] = []  # newest first
    positions: list[float] = []
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        slopes = [levels.slope(level, x, x0), *slopes][:order]
        positions = [float(levels.position(level)), *positions][:order]
        weights = _integrals(positions, positions[0], float(levels.position(after)))
        yield (step := Step(level, after, x, x0, levels.along(level, after, x, zip(weights, slopes, strict=True))))
        x = step.x_next


def _integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integral from start to end of each Lagrange polynomial on `nodes`; two Gauss points are exact up to cubics."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]

    def polynomial(j: int, at: float) -> float:
        return math.prod((at - p) / (nodes[j] - p) for i, p in enumerate(nodes) if i != j)

    return [half * sum(polynomial(j, at) for at in points) for j in range(len(nodes))]
