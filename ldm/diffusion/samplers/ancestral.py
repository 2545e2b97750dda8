"""What ancestral steps share: how much of the next level's noise is fresh."""

from __future__ import annotations

from ldm.diffusion.levels import Level, Levels


def fresh_noise(level: Level, after: Level, eta: float) -> float:
    """Standard deviation of fresh noise in x_next; eta 1 is the posterior's (Song et al. 2021, Equation 16).

    For any alpha and sigma, from pure noise (alpha = 0) too.
    """
    # The variance left when x_t is known to come from x_next; rounding must not make it negative.
    left = max(float(level.sigma**2 - (level.alpha * after.sigma / after.alpha) ** 2), 0.0)
    return min(eta * float(after.sigma / level.sigma) * left**0.5, float(after.sigma))


def without_noise(level: Level, after: Level, eta: float, levels: Levels) -> tuple[Level, float]:
    """The cleaner level that a step leads to before fresh noise lifts it to `after`, and that noise's deviation."""
    fresh = fresh_noise(level, after, eta)
    if fresh == 0:
        return after, 0.0
    return levels.scheduler.level_at((after.sigma**2 - fresh**2) ** 0.5 / after.alpha), fresh
