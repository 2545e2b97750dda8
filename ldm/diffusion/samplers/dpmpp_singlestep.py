"""DPM-Solver++ in blocks of two or three steps: 2S and 3S."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.levels import Levels, weighted_sum
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def dpmpp_singlestep(
    denoise: Denoise,
    levels: Levels,
    x: Tensor,
    noise: Noise,
    order: int = 2,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = False,
) -> Iterator[Step]:
    """Lu et al. 2022b, Algorithm 1, on the grid's own levels: inside a block of `order` steps each one starts again
    from the block's first x and uses all calls of the block; only the block's last x is of that order.

    solver_type: of steps of order 2, as in `dpmpp_multistep`.
    lower_order_final: the last step is of order 1 where whole blocks fill the run. Into sigma = 0 it always is.
    """
    ends = levels[-1].sigma == 0 or (lower_order_final and levels.num_steps % order == 0)
    orders = _orders(levels.num_steps, order, ends)[1 - len(levels) :]
    block: list[tuple[Tensor, float]] = []  # x0 and half log-SNR, oldest first
    start = (levels[0], x)
    for (level, after), wanted in zip(pairwise(levels), orders, strict=True):
        x0, here = denoise(x, level), float(level.log_snr) / 2
        # Image to image may begin within a block; half-way from pure noise there is nothing to interpolate.
        reached = min(wanted, 1 + len(block)) if start[0].alpha > 0 else 1
        if reached == 1:
            block, start = [], (level, x)
        block.append((x0, here))
        (first, x_first), (x0_first, at_first) = start, block[0]
        shrink = after.sigma * first.alpha / (first.sigma * after.alpha)  # exp(-h), finite at both ends
        keep, gain = after.sigma / first.sigma, after.alpha * (1 - shrink)
        terms = [(keep, x_first), (gain, x0_first)]
        if reached > 1:
            h = float(after.log_snr) / 2 - at_first
            midpoint = reached == 2 and solver_type == "midpoint"  # else the exact integral of a line
            weight = gain / 2 if midpoint else after.alpha * (1 + math.expm1(-h) / h)
            change = weight * h / (here - at_first)  # of x0 - x0_first
            terms = [(keep, x_first), (gain - change, x0_first), (change, x0)]
        yield (step := Step(level, after, x, x0, weighted_sum(*terms)))
        x = step.x_next


def _orders(num_steps: int, order: int, first_at_last: bool) -> list[int]:
    """Blocks 1, 2, .., order, the last one cut short by the end, or by a first-order step there."""
    orders = [1 + i % order for i in range(num_steps)]
    return [*orders[:-1], 1] if first_at_last else orders
