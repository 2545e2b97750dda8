"""How much noise: one level, and the sequence of levels that a sampler walks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.devices import on_device

if TYPE_CHECKING:
    from ldm.diffusion.schedulers import Scheduler

Number = float | Tensor
Coordinate = Literal["ratio", "sigma"]


class Level(NamedTuple):
    """One amount of noise, x_t = alpha x0 + sigma eps.

    Python floats when sampling, float64 tensors of shape (B,) when training.

    t: time in [0, 1]; 0 is data, 1 is noise.
    timestep: what the network is told (the real table index, or 1000 t for rectified flow).
    """

    t: Number
    alpha: Number
    sigma: Number
    timestep: Number

    @property
    def ratio(self) -> Number:
        """sigma/alpha: 0 at data, infinite at pure noise."""
        if isinstance(self.alpha, Tensor) or self.alpha:
            return self.sigma / self.alpha
        return math.inf

    @property
    def log_snr(self) -> Number:
        """2 log(alpha/sigma): infinite at data, minus infinite at pure noise."""
        ratio = self.ratio
        if isinstance(ratio, Tensor):
            return -2 * ratio.log()
        return -2 * math.log(ratio) if ratio else math.inf

    def position(self, coordinate: Coordinate) -> Number:
        """The slope solvers' independent variable: sigma, or sigma/alpha."""
        return self.sigma if coordinate == "sigma" else self.ratio

    def noised(self, x0: Tensor, eps: Tensor) -> Tensor:  # (B,C,H,W) x2 -> (B,C,H,W)
        """x_t = alpha x0 + sigma eps."""
        return right_pad(self.alpha, x0) * x0 + right_pad(self.sigma, x0) * eps

    def to(self, device: torch.device | str) -> Level:
        """Its tensors on a device, in one copy."""
        tensors = [v for v in self if isinstance(v, Tensor)]
        moved = iter(on_device(torch.stack(tensors), device).unbind() if tensors else ())
        return Level(*(next(moved) if isinstance(v, Tensor) else v for v in self))


def floats(levels: Level) -> list[Level]:
    """One level a time instead of one with (B,) tensors: a table reads 50 entries at once in the time of one."""
    return [Level(*numbers) for numbers in zip(*(torch.as_tensor(v).tolist() for v in levels), strict=True)]


def right_pad(value: Number, like: Tensor) -> Number:
    """(B,) -> (B, 1, 1, 1) in the dtype of `like`; floats pass through."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def weighted_sum(*terms: tuple[Number, Tensor]) -> Tensor:
    """The sum of weight times tensor. Weights that are floats cost one operation a term: host time is what counts."""
    total = terms[0][0] * terms[0][1]
    for weight, tensor in terms[1:]:
        total = total + weight * tensor if isinstance(weight, Tensor) else torch.add(total, tensor, alpha=weight)
    return total


class Levels(Sequence[Level]):
    """The levels of one sampling run, noisiest first; n steps have n + 1 levels.

    start: what multiplies the first standard-normal noise to give x_t.
    coordinate: in which slope solvers (Euler, Heun, LMS) integrate: "ratio" is x/alpha over sigma/alpha
        (tables, EDM), "sigma" is x over sigma (rectified flow, where alpha is 0 at t = 1).
    scheduler: gives levels between these, for solvers that look half-way.
    num_steps: of the whole run, also where these are only the last part of its levels (image to image).
    """

    def __init__(
        self,
        levels: Sequence[Level],
        start: float,
        coordinate: Coordinate,
        scheduler: Scheduler,
        num_steps: int | None = None,
    ):
        self._levels = tuple(levels)
        self.start, self.coordinate, self.scheduler = start, coordinate, scheduler
        self.num_steps = len(self._levels) - 1 if num_steps is None else num_steps

    def __len__(self) -> int:
        return len(self._levels)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Levels(self._levels[index], self.start, self.coordinate, self.scheduler, self.num_steps)
        return self._levels[index]

    def at(self, position: Number) -> Level:
        """The scheduler's level at a position of the coordinate."""
        return self.scheduler.level_at_position(position)

    def scale(self, level: Level) -> Number:
        """What x_t is divided by in the slope solvers' coordinate."""
        return level.alpha if self.coordinate == "ratio" else 1.0

    def position(self, level: Level) -> Number:
        """The slope solvers' independent variable."""
        return level.position(self.coordinate)

    def slope(self, level: Level, x: Tensor, x0: Tensor) -> Tensor:
        """d y/d position of y = x/scale on the probability-flow ODE, (y - x0)/position."""
        position = self.position(level)
        return weighted_sum((1 / self.scale(level) / position, x), (-1 / position, x0))

    def along(self, level: Level, after: Level, x: Tensor, slopes: Iterable[tuple[Number, Tensor]]) -> Tensor:
        """x at `after`, y + sum of weight times slope."""
        scale = self.scale(after)
        return weighted_sum((scale / self.scale(level), x), *((scale * weight, slope) for weight, slope in slopes))

    def euler(self, level: Level, after: Level, x: Tensor, x0: Tensor) -> Tensor:
        """x at `after`, y + h slope: y goes towards x0 as the position falls."""
        kept, scale = self.position(after) / self.position(level), self.scale(after)
        return weighted_sum((scale * kept / self.scale(level), x), (scale * (1 - kept), x0))
