"""UniPC: every step predicts, the next call of the network corrects it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.levels import Level, Levels, weighted_sum
from ldm.diffusion.samplers.solver import Denoise, Noise, Step

Known = list[tuple[Tensor, float]]  # x0 and half log-SNR, newest first


def unipc(
    denoise: Denoise,
    levels: Levels,
    x: Tensor,
    noise: Noise,
    order: int = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """Zhao et al. 2023, Algorithms 1 and 2, on x0; variant: B(h) = h ("bh1") or exp(h) - 1 ("bh2").

    lower_order_final: the last steps are of order .., 3, 2, 1. Into sigma = 0 order 1 is the only one.
    Step.x_t is what the network saw; the corrected x is where the step starts from.
    """
    known: Known = []
    corrected, before, used = x, levels[0], 0  # where the step before started, its level, its order
    for left, (level, after) in zip(range(len(levels) - 1, 0, -1), pairwise(levels), strict=True):
        x0 = denoise(x, level)
        # From pure noise the first step is exact for a constant x0: there is nothing to correct with.
        start = x if used == 0 or before.alpha == 0 else _move(corrected, before, level, known[:used], variant, x0)
        if level.alpha > 0:
            known = [(x0, float(level.log_snr) / 2), *known][:order]
        ends = after.sigma in (0, level.sigma)  # a last step of length 0, as in dpmpp_multistep
        used = 1 if ends else min(order, left if lower_order_final else order, max(1, len(known)))
        newest = known[:used] if level.alpha > 0 else [(x0, -math.inf)]
        yield (step := Step(level, after, x, x0, _move(start, level, after, newest, variant)))
        corrected, before, x = start, level, step.x_next


def _move(x: Tensor, level: Level, after: Level, known: Known, variant: str, x0_after: Tensor | None = None) -> Tensor:
    """From `level` to `after` through the known x0s; with x0 at `after` it is the corrector."""
    x0, here = known[0]
    shrink = after.sigma * level.alpha / (level.sigma * after.alpha)  # exp(-h), finite at both ends
    others = known[1:] if x0_after is None else [*known[1:], (x0_after, float(after.log_snr) / 2)]
    changes = []  # the weight of each other x0 less the newest
    if others:
        h = float(after.log_snr) / 2 - here
        distances = [(at - here) / h for _, at in others]
        scale = -h if variant == "bh1" else float(shrink) - 1
        weights = [0.5] if len(others) == 1 else _weights(distances, h, scale)
        changes = [-after.alpha * scale * weight / d for weight, d in zip(weights, distances, strict=True)]
    terms = [(change, other) for change, (other, _) in zip(changes, others, strict=True)]
    return weighted_sum((after.sigma / level.sigma, x), (after.alpha * (1 - shrink) - sum(changes), x0), *terms)


def _weights(distances: list[float], h: float, scale: float) -> list[float]:
    """The rows of Equation 6 solved for rho: powers of the distances against phi_{k+1}(-h) k! / B(-h)."""
    right, phi = [], math.expm1(-h) / -h - 1
    for k in range(1, len(distances) + 1):
        right.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    return _solved(distances, right)


def _solved(nodes: list[float], right: list[float]) -> list[float]:
    """Weights w with sum_j w_j nodes_j^k = right_k: each row less the one above times a node is free of that node."""
    if len(nodes) == 1:
        return right
    *others, last = nodes
    fewer = _solved(others, [row - last * above for above, row in pairwise(right)])
    weights = [w / (node - last) for w, node in zip(fewer, others, strict=True)]
    return [*weights, right[0] - sum(weights)]
