"""UniPC: every step predicts, the next call of the network corrects it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.levels import Level, Levels
from ldm.diffusion.samplers.solver import Denoise, Noise, Step

Known = list[tuple[Tensor, float]]  # x0 and half log-SNR, newest first


def unipc(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, order: int = 2, variant: Literal["bh1", "bh2"] = "bh2"
) -> Iterator[Step]:
    """Zhao et al. 2023, Algorithms 1 and 2, on x0; variant: B(h) = h ("bh1") or exp(h) - 1 ("bh2").

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
        used = min(order, left, max(1, len(known)))
        newest = known[:used] if level.alpha > 0 else [(x0, -math.inf)]
        step = Step(level, after, x, x0, _move(start, level, after, newest, variant))
        yield step
        corrected, before, x = start, level, step.x_next


def _move(x: Tensor, level: Level, after: Level, known: Known, variant: str, x0_after: Tensor | None = None) -> Tensor:
    """From `level` to `after` through the known x0s; with x0 at `after` it is the corrector."""
    x0, here = known[0]
    shrink = after.sigma * level.alpha / (level.sigma * after.alpha)  # exp(-h), finite at both ends
    x_next = after.sigma / level.sigma * x + after.alpha * (1 - shrink) * x0
    others = [(other, at) for other, at in known[1:]]
    if x0_after is not None:
        others.append((x0_after, float(after.log_snr) / 2))
    if not others:
        return x_next
    h = float(after.log_snr) / 2 - here
    distances = [(at - here) / h for _, at in others]
    scale = -h if variant == "bh1" else float(shrink) - 1
    weights = [0.5] if len(others) == 1 else _weights(distances, h, scale)
    for weight, distance, (other, _) in zip(weights, distances, others, strict=True):
        x_next = x_next - after.alpha * scale * weight / distance * (other - x0)
    return x_next


def _weights(distances: list[float], h: float, scale: float) -> list[float]:
    """The rows of Equation 6 solved for rho: powers of the distances against phi_{k+1}(-h) k! / B(-h)."""
    rows, right, phi = [], [], math.expm1(-h) / -h - 1
    for k in range(1, len(distances) + 1):
        rows.append([d ** (k - 1) for d in distances])
        right.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
    return solved.tolist()
