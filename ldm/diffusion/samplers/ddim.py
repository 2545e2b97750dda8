"""DDIM, from the deterministic ODE (eta 0) to ancestral sampling (eta 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import Level, Levels, weighted_sum
from ldm.diffusion.samplers.ancestral import fresh_noise
from ldm.diffusion.samplers.solver import Denoise, Noise, Step


def ddim(
    denoise: Denoise,
    levels: Levels,
    x: Tensor,
    noise: Noise,
    eta: float = 0.0,
    s_noise: float = 1.0,
    limit_x0: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Song et al. 2021, Equations 12 and 16, for any alpha and sigma.

    limit_x0: diffusers' clipping, of the x0 that is added alone. A solver's `limit` changes the noise beside it.
    """
    for level, after in pairwise(levels):
        x0 = denoise(x, level)
        fresh = s_noise * noise(x) if eta > 0 else None
        x_next = renoised(x, x0, level, after, eta, fresh)
        if limit_x0 is not None:
            x0, raw = limit_x0(x0), x0
            x_next = x_next + after.alpha * (x0 - raw)
        yield (step := Step(level, after, x, x0, x_next))
        x = step.x_next


def renoised(x: Tensor, x0: Tensor, level: Level, after: Level, eta: float, fresh: Tensor | None) -> Tensor:
    """x0 with the noise of `after`: a share of it fresh, the rest in the direction of x_t's own."""
    deviation = fresh_noise(level, after, eta)
    keep = (after.sigma**2 - deviation**2) ** 0.5 / level.sigma  # of x, and with it of eps
    drawn = [] if fresh is None else [(deviation, fresh)]
    return weighted_sum((keep, x), (after.alpha - keep * level.alpha, x0), *drawn)
