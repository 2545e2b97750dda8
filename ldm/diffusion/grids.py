"""Which levels a sampler visits: the spacing is the user's choice, the conventions are the sampler's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ldm.diffusion.levels import Level, Levels
from ldm.diffusion.schedulers import Scheduler
from ldm.errors import ConfigError

Spacing = Callable[[Scheduler, int], list[float]]


def linspace(scheduler: Scheduler, num_steps: int) -> list[float]:
    """Evenly from t = 1 to the table's first entry, both included."""
    first = 1 / scheduler.num_train_timesteps
    if num_steps == 1:
        return [1.0]
    return [1 - (1 - first) * i / (num_steps - 1) for i in range(num_steps)]


def trailing(scheduler: Scheduler, num_steps: int) -> list[float]:
    """Evenly from t = 1, the last step ending at t = 0 (Lin et al. 2024, Table 2)."""
    return [1 - i / num_steps for i in range(num_steps)]


@dataclass(frozen=True)
class Conventions:
    """What published samplers do differently on the same spacing.

    rounded: times are rounded to the table's entries.
    last: the level after the last step: no noise at all, or the table's first entry.
    start: the first x_t is noise ("one"), or sigma of the first level times noise ("sigma").
    """

    rounded: bool = True
    last: Literal["zero", "entry"] = "zero"
    start: Literal["one", "sigma"] = "one"

    def levels(self, scheduler: Scheduler, num_steps: int, spacing: Spacing) -> Levels:
        """The n + 1 levels of n steps. Raises ConfigError when there are no n of them."""
        if num_steps < 1:
            raise ConfigError(f"num_steps={num_steps}: sampling needs at least one step, for example num_steps=30.")
        times = spacing(scheduler, num_steps)
        if self.rounded:
            times = [scheduler.snap(t) for t in times]
        if len(set(times)) < len(times):
            raise ConfigError(
                f"num_steps={num_steps} is more than the scheduler's {scheduler.num_train_timesteps} timesteps "
                f"can tell apart: use num_steps={scheduler.num_train_timesteps} or fewer."
            )
        levels = [scheduler.level(t) for t in times]
        end = 0.0 if self.last == "zero" else 1 / scheduler.num_train_timesteps
        last = scheduler.level(end)
        if levels[-1].sigma <= last.sigma:  # the grid's own last point is already there
            levels.pop()
        start = 1.0 if self.start == "one" else float(levels[0].sigma)
        return Levels([*levels, Level(*last)], start, scheduler.coordinate)
