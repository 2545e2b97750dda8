"""Which levels a sampler visits: the spacing is the user's choice, the conventions are the sampler's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.levels import Level, Levels, floats
from ldm.diffusion.schedulers import Scheduler, Table, check_number
from ldm.errors import ConfigError


class Positions(list[float]):
    """Points given by the solvers' coordinate (sigma/alpha, or sigma for rectified flow) instead of time.

    whole: how samplers that tell the network whole timesteps make them of real ones.
    """

    def __init__(self, values: Iterable[float], whole: Callable[[float], int] = round):
        super().__init__(values)
        self.whole = whole


Spacing = Callable[[Scheduler, int], list[float]]  # times, or Positions; noisiest first

# Solvers that divide by alpha stand here instead of at alpha = 0 (alpha_bar = 2^-24, sigma/alpha 4096 less a little).
_NEARLY_PURE_NOISE = math.sqrt(2.0**24 - 1)


def linspace(scheduler: Scheduler, num_steps: int) -> list[float]:
    """Evenly in time from t = 1 to the first entry, both included."""
    first = scheduler.first_time
    if num_steps == 1:
        return [1.0]
    return [1 - (1 - first) * i / (num_steps - 1) for i in range(num_steps)]


def leading(scheduler: Scheduler, num_steps: int, offset: int = 1) -> list[float]:
    """Entries offset, offset + N//n, ... (as Ho et al. 2020 sampled; Stable Diffusion moved it by 1).

    They may reach above t = 1: then there are no such levels, and a sampler refuses.
    """
    n = scheduler.num_train_timesteps
    check_number("grid.offset", offset, 0, n - 1, "0 or 1", whole=True)
    stride = n // num_steps
    return [((num_steps - 1 - i) * stride + offset + 1) / n for i in range(num_steps)]


def trailing(scheduler: Scheduler, num_steps: int) -> list[float]:
    """Evenly from t = 1, the last step ending at t = 0 (Lin et al. 2024, Table 2)."""
    return [1 - i / num_steps for i in range(num_steps)]


def karras(scheduler: Scheduler, num_steps: int, rho: float = 7.0, ends: Spacing | None = None) -> Positions:
    """sigma^(1/rho) evenly spaced (Karras et al. 2022, Equation 5) over the scheduler's range, or that of `ends`."""
    low, high = (v ** (1 / rho) for v in _range(scheduler, num_steps, ends))
    return Positions((high + (low - high) * f) ** rho for f in _fractions(num_steps))


def logsnr(scheduler: Scheduler, num_steps: int, ends: Spacing | None = None) -> Positions:
    """log sigma evenly spaced (Lu et al. 2022, Section 3.4) over the scheduler's range, or that of `ends`."""
    low, high = (math.log(v) for v in _range(scheduler, num_steps, ends))
    return Positions(math.exp(high + (low - high) * f) for f in _fractions(num_steps))


def exponential(scheduler: Scheduler, num_steps: int, ends: Spacing | None = None) -> Positions:
    """The sigmas of `logsnr`; whole timesteps are cut off instead of rounded, as published samplers have it."""
    return Positions(logsnr(scheduler, num_steps, ends), math.floor)


def beta(
    scheduler: Scheduler, num_steps: int, a: float = 0.6, b: float = 0.6, ends: Spacing | None = None
) -> Positions:
    """sigma at even quantiles of a Beta(a, b) over the scheduler's range (Lee et al. 2024): more steps at both ends."""
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ConfigError("grid=beta needs scipy: pip install 'ldm[beta]', or use grid=karras.") from error
    low, high = _range(scheduler, num_steps, ends)
    quantiles = (float(distribution.ppf(1 - f, a, b)) for f in _fractions(num_steps))
    return Positions((low + (high - low) * q for q in quantiles), math.floor)


def distilled(scheduler: Scheduler, num_steps: int, steps: int = 50) -> list[float]:
    """Of the `steps` entries that a consistency model was distilled on, evenly chosen ones (Luo et al. 2023)."""
    if not isinstance(scheduler, Table):
        raise ConfigError(
            f"sampler=lcm needs a scheduler with a table, {type(scheduler).__name__} is a formula: "
            "use another sampler=, or a distilled model of scheduler=scaled_linear."
        )
    if num_steps > steps:
        raise ConfigError(
            f"num_steps={num_steps}: the model was distilled on {steps} steps; use num_steps={steps} or fewer (4 to 8 "
            "are usual)."
        )
    n = scheduler.num_train_timesteps
    check_number("distilled steps", steps, 1, n, 50, whole=True)
    return [(steps - i * steps // num_steps) * (n // steps) / n for i in range(num_steps)]


def geometric(scheduler: Scheduler, num_steps: int, ratio: float = 0.9) -> Positions:
    """Each sigma/alpha `ratio` times the one before, from the scheduler's largest."""
    if scheduler.coordinate == "sigma":
        raise ConfigError(
            "a grid of constant ratios needs a finite sigma/alpha at t = 1, which rectified flow does not have: "
            "use sampler=euler, or a model of another scheduler."
        )
    if not 0 < ratio < 1:
        raise ConfigError(f"ratio={ratio} must be within 0 and 1, for example 0.9.")
    return Positions(_range(scheduler, num_steps)[1] * ratio**i for i in range(num_steps))


@dataclass(frozen=True)
class Conventions:
    """What published samplers do differently on the same spacing.

    rounded: "all": times are rounded to the table's entries, positions are kept and what the network is told becomes
        whole; "cut": the same, but always cut off; "karras": only what it is told at positions that round; "none".
        Times of `trailing` are rounded always.
    extra_point: on linspace and leading, n steps are the first n of n + 1 points.
    second_twice: the second level is visited twice (pseudo linear multistep methods begin so).
    last: the level after the last step: no noise at all, or the table's first entry.
    start: the first x_t is noise ("one"), or sigma of the first level times noise ("sigma") where that is the noisiest.
    pure_noise: whether the solver takes alpha = 0, or stands a little before it.
    """

    rounded: Literal["all", "cut", "karras", "none"] = "all"
    extra_point: bool = False
    second_twice: bool = False
    last: Literal["zero", "entry"] = "zero"
    start: Literal["one", "sigma"] = "one"
    pure_noise: bool = True

    def levels(self, scheduler: Scheduler, num_steps: int, spacing: Spacing) -> Levels:
        """The n + 1 levels of n steps. Raises ConfigError when there are no n of them."""
        check_number("num_steps", num_steps, 1, 100_000, 30, whole=True)
        levels = self._distinct(scheduler, num_steps, spacing)
        if not levels:
            fewer = range(min(num_steps - 1, scheduler.num_train_timesteps), 0, -1)[:1000]
            fitting = next((n for n in fewer if self._distinct(scheduler, n, spacing)), None)
            raise ConfigError(
                f"num_steps={num_steps}: this grid does not find as many different levels on the scheduler's "
                f"{scheduler.num_train_timesteps} timesteps: "
                + (f"use num_steps={fitting}." if fitting else "use grid=trailing, or a smaller offset.")
            )
        last = scheduler.level_at(0.0) if self.last == "zero" else scheduler.level(scheduler.first_time)
        keeps_signal = levels[0].alpha == 1  # EDM: noise is added to data of full size, and has no other scale
        noisiest = levels[0].t > 1 - 1e-9
        start = float(levels[0].sigma) if keeps_signal or (self.start == "sigma" and noisiest) else 1.0
        if self.second_twice and len(levels) > 1:
            levels.insert(1, levels[1])
        return Levels([*levels, last], start, scheduler.coordinate, scheduler, num_steps)

    def _distinct(self, scheduler: Scheduler, num_steps: int, spacing: Spacing) -> list[Level]:
        """The levels before the last one; none where two of them are one, or lie above t = 1."""
        grid = spacing.func if isinstance(spacing, partial) else spacing
        points = spacing(scheduler, num_steps + (self.extra_point and grid in (linspace, leading)))
        whole = points.whole if isinstance(points, Positions) else None
        if whole is None and points[0] > 1 + 1e-9:
            return []
        times = torch.tensor(points[:num_steps], dtype=torch.float64)
        levels = self._levels(scheduler, torch.as_tensor(scheduler.snap(times)) if grid is trailing else times, whole)
        return levels if len({level.ratio for level in levels}) == num_steps else []

    def _levels(self, scheduler: Scheduler, points: Tensor, whole: Callable[[float], int] | None) -> list[Level]:
        if whole is not None:
            whole = math.floor if self.rounded == "cut" else whole
            wanted = self.rounded in ("all", "cut") or (self.rounded == "karras" and whole is round)
            levels = floats(scheduler.level_at_position(points))
            if not (wanted and scheduler.coordinate == "ratio" and scheduler.first_time > 0):
                return levels
            # Inverting the table and back misses entries by 1e-12, which cutting off must not see.
            # Cutting off takes 999 to 998, as where these grids were published: rounding leaves it just below 999.
            return [lv._replace(timestep=max(0, whole(float(lv.timestep) - 1e-9))) for lv in levels]
        levels = floats(scheduler.level(scheduler.snap(points) if self.rounded in ("all", "cut") else points))
        if scheduler.coordinate == "ratio" and not self.pure_noise:
            nearly = scheduler.level_at(_NEARLY_PURE_NOISE)
            return [lv if lv.alpha else lv._replace(alpha=nearly.alpha, sigma=nearly.sigma) for lv in levels]
        return levels


def _fractions(num_steps: int) -> list[float]:
    return [i / max(1, num_steps - 1) for i in range(num_steps)]


def _range(scheduler: Scheduler, num_steps: int, ends: Spacing | None = None) -> tuple[float, float]:
    """The positions of the least and most noisy entry, or of the last and first point of `ends`; finite, above 0."""
    first = max(scheduler.first_time, 1e-9) if scheduler.coordinate == "sigma" else scheduler.first_time
    times = [1.0, first] if ends is None else ends(scheduler, num_steps)
    low, top = (
        float(scheduler.level(scheduler.snap(min(t, 1.0))).position(scheduler.coordinate))
        for t in (times[-1], times[0])
    )
    return low, top if math.isfinite(top) else _NEARLY_PURE_NOISE
