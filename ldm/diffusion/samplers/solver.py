"""What a sampler is: a generator of steps, with its family's conventions on grids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from ldm.diffusion.grids import Conventions, Spacing, trailing
from ldm.diffusion.levels import Level, Levels
from ldm.diffusion.schedulers import Scheduler
from ldm.errors import ConfigError

Denoise = Callable[[Tensor, Level], Tensor]  # (B,C,H,W) -> (B,C,H,W), the estimate of x0
Noise = Callable[[Tensor], Tensor]  # standard normal, like its argument


@dataclass
class Step:
    """One step of a sampler. Only `x_next` may be replaced by the consumer; the solver goes on from it.

    x_t, x0, x_next: (B, C, H, W) the current latent, the jump to x0 from it, and where the solver goes.
    """

    level: Level
    next: Level
    x_t: Tensor
    x0: Tensor
    x_next: Tensor


Solve = Callable[..., Iterator[Step]]  # (denoise, levels, x, noise, **its own options)


@dataclass(frozen=True)
class Solver:
    """A named sampler: its steps, and the grid it walks where nothing else is said.

    own_grid: the method works on this spacing only; another is refused.
    limit: what every jump to x0 goes through (ldm/diffusion/thresholding.py).
    """

    solve: Solve
    spacing: Spacing = trailing
    conventions: Conventions = field(default_factory=Conventions)
    own_grid: bool = False
    limit: Callable[[Tensor], Tensor] | None = None

    def levels(self, scheduler: Scheduler, num_steps: int, spacing: Spacing | None = None) -> Levels:
        if spacing is not None and self.own_grid:
            raise ConfigError(f"sampler={self.name} walks its own grid: leave grid= out.")
        return self.conventions.levels(scheduler, num_steps, spacing or self.spacing)

    def __call__(self, denoise: Denoise, levels: Levels, x: Tensor, noise: Noise) -> Iterator[Step]:
        limit = self.limit
        limited = denoise if limit is None else lambda x_t, level: limit(denoise(x_t, level))
        return self.solve(limited, levels, x, noise)

    def with_eta(self, eta: float | None) -> Solver:
        """The same sampler with this share of fresh noise; ConfigError where the method has no such thing."""
        if eta is None:
            return self
        if "eta" not in inspect.signature(self.solve).parameters:
            raise ConfigError(f"eta={eta}: sampler {self.name} has no eta; leave it out or use sampler=ddim.")
        return replace(self, solve=partial(self.solve, eta=eta))

    @property
    def name(self) -> str:
        """The function's name."""
        return (self.solve.func if isinstance(self.solve, partial) else self.solve).__name__
