"""Which times are trained on: a uniform draw per sample becomes a level.

The draws come from the trainer, by position in the global batch, so that they depend neither on ranks nor on
micro-batches. `stratified` asks it for one draw in each of B equal strata of the global batch, which takes noise out of
the loss (Kingma et al. 2021). `continuous` reads tables between their entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.levels import Level
from ldm.diffusion.schedulers import Scheduler


class Times(ABC):
    def __init__(self, stratified: bool = False):
        self.stratified = stratified

    @abstractmethod
    def __call__(self, u: Tensor, scheduler: Scheduler) -> Level:
        """(B,) draws in (0, 1) -> (B,) levels."""


class Uniform(Times):
    """Every time equally likely."""

    def __init__(self, stratified: bool = False, continuous: bool = False):
        super().__init__(stratified)
        self.continuous = continuous

    def __call__(self, u, scheduler):
        u = u.double()
        return scheduler.level(u if self.continuous else scheduler.training_time(u))


class LogitNormal(Uniform):
    """log(t/(1 - t)) ~ N(mean, std^2): the middle of the path more often (Esser et al. 2024, Equation 19)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False, continuous: bool = False):
        super().__init__(stratified, continuous)
        self.mean, self.std = mean, std

    def __call__(self, u, scheduler):
        return super().__call__(torch.sigmoid(self.mean + self.std * _normal(u)), scheduler)


class LogNormal(Times):
    """log(sigma/alpha) ~ N(mean, std^2), within the scheduler's range (Karras et al. 2022, Table 1).

    Karras' mean of -1.2 is for data of standard deviation 0.5; latents have 1, hence log 2 more.
    """

    def __init__(self, mean: float = -0.5, std: float = 1.2, stratified: bool = False):
        super().__init__(stratified)
        self.mean, self.std = mean, std

    def __call__(self, u, scheduler):
        low, high = (scheduler.level(t).ratio for t in (scheduler.first_time, 1.0))
        return scheduler.level_at((self.mean + self.std * _normal(u)).exp().clamp(low, high))


def _normal(u: Tensor) -> Tensor:
    """The standard normal's quantiles at u."""
    return torch.special.ndtri(u.double())
