"""DEIS: exponential integration of the probability-flow ODE with polynomials in log sigma."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def deis(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, order: int = 3, lower_order_final: bool = True
) -> Iterator[Step]:
    """Zhang and Chen 2022 (log-rho): slopes interpolated in log(position), integrated exactly; order 1 to 3.

    First order into sigma = 0; lower_order_final: as in `dpmpp_multistep`.
    """
    history: list[tuple[float, Tensor]] = []  # position and slope, newest first
    for left, (level, after) in zip(range(len(levels) - 2, -1, -1), pairwise(levels), strict=True):
        x0 = denoise(x, level)
        start, end = float(levels.position(level)), float(levels.position(after))
        history = [(start, levels.slope(level, x, x0)), *history][:order]
        short = left + 1 if lower_order_final and levels.num_steps < 15 else order
        used = history[: 1 if end == 0 else short]
        weights = _integrals([position for position, _ in used], start, end) if len(used) > 1 else [end - start]
        slopes = [(weight, slope) for weight, (_, slope) in zip(weights, used, strict=True)]
        yield (step := Step(level, after, x, x0, levels.along(level, after, x, slopes)))
        x = step.x_next


def _integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Integral over the position of each Lagrange polynomial in u = log(position / start), degree 1 or 2."""
    u = [math.log(node / start) for node in nodes]
    last = math.log(end / start)
    # Integrals of 1, u and u^2 with d position = start e^u du, from 0 to `last`.
    grown = math.exp(last)
    one, linear, square = grown - 1, (last - 1) * grown + 1, (last**2 - 2 * last + 2) * grown - 2
    weights = []
    for j, mine in enumerate(u):
        others = [v for i, v in enumerate(u) if i != j]
        scale = start / math.prod(mine - v for v in others)
        total = sum(others)
        constant = math.prod(-v for v in others)
        whole = linear + constant * one if len(others) == 1 else square - total * linear + constant * one
        weights.append(scale * whole)
    return weights
