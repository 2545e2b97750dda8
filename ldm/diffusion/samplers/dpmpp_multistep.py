"""DPM-Solver++ from the steps before: 1M, 2M, 3M, and their stochastic forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.levels import Levels, weighted_sum
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def dpmpp_multistep(
    denoise: Denoise,
    levels: Levels,
    x: Tensor,
    noise: Noise,
    order: int = 2,
    eta: float = 0.0,
    s_noise: float = 1.0,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Step]:
    """Lu et al. 2022b, Algorithm 2 (order 2) and Crowson 2022 (order 3; eta > 0: SDE-DPM-Solver++).

    Order 3 halves the second difference that the integral asks for, as published and in diffusers: measured order 2.

    solver_type: of steps of order 2, half the step's own weight for the slope of x0, or the exact integral of a line.
    lower_order_final: in runs of fewer than 15 steps the last step is of order 1, the last but one of 2.
    euler_at_final: the last step is of order 1. Into sigma = 0 it always is.
    """
    history: list[tuple[Tensor, float]] = []  # x0 and half log-SNR, newest first
    for left, (level, after) in zip(range(len(levels) - 2, -1, -1), pairwise(levels), strict=True):
        x0 = denoise(x, level)
        here = float(level.log_snr) / 2
        # exp(-h) as a quotient is finite at alpha = 0 and at sigma = 0; h itself is not.
        shrink = after.sigma * level.alpha / (level.sigma * after.alpha)
        keep, gain = after.sigma / level.sigma * shrink**eta, after.alpha * (1 - shrink ** (1 + eta))
        terms = [(keep, x), (gain, x0)]
        short = left + 1 if lower_order_final and levels.num_steps < 15 else order
        # A grid that ends on the table's first entry, and then goes there once more, has a last step of length 0.
        first = after.sigma in (0, level.sigma) or (euler_at_final and left == 0)
        reached = 1 if first else min(order, short, 1 + len(history))
        if reached > 1:
            h, (x0_1, at_1) = float(after.log_snr) / 2 - here, history[0]
            r, g = (here - at_1) / h, (1 + eta) * h
            phi_2 = 1 + math.expm1(-g) / g
            if reached == 2:
                change = (gain / 2 if solver_type == "midpoint" else after.alpha * phi_2) / r  # weight of x0 - x0_1
                terms = [(keep, x), (gain + change, x0), (-change, x0_1)]
            else:
                x0_2, at_2 = history[1]
                second = after.alpha * (phi_2 * r + 0.5 - phi_2 / g) * h / (here - at_2)
                change, before = (after.alpha * phi_2 + second) / r, second * h / (at_1 - at_2)
                terms = [(keep, x), (gain + change, x0), (-change - before, x0_1), (before, x0_2)]
        if eta > 0 and after.sigma > 0:
            terms.append((s_noise * after.sigma * (1 - shrink ** (2 * eta)) ** 0.5, noise(x)))
        yield (step := Step(level, after, x, x0, weighted_sum(*terms)))
        history, x = [(x0, here), *history][: order - 1] if order > 1 else [], step.x_next
