"""What ancestral steps share: how much of the next level's noise is fresh."""

from __future__ import annotations

from itertools import pairwise

import torch

from ldm.diffusion.levels import Level, Levels, floats


def fresh_noise(level: Level, after: Level, eta: float) -> float:
    """Standard deviation of fresh noise in x_next; eta 1 is the posterior's (Song et al. 2021, Equation 16).

    For any alpha and sigma, from pure noise (alpha = 0) too.
    """
    # The variance left when x_t is known to come from x_next; rounding must not make it negative.
    left = max(float(level.sigma**2 - (level.alpha * after.sigma / after.alpha) ** 2), 0.0)
    return min(eta * float(after.sigma / level.sigma) * left**0.5, float(after.sigma))


def without_noise(levels: Levels, eta: float) -> list[tuple[Level, float]]:
    """For each step the cleaner level that it leads to before fresh noise lifts it, and that noise's deviation."""
    steps = list(pairwise(levels))
    fresh = [fresh_noise(level, after, eta) for level, after in steps]
    ratios = [(after.sigma**2 - f**2) ** 0.5 / after.alpha for (_, after), f in zip(steps, fresh, strict=True)]
    return list(zip(floats(levels.scheduler.level_at(torch.tensor(ratios, dtype=torch.float64))), fresh, strict=True))
