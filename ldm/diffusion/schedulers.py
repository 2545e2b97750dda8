"""Noise schedulers: time -> (alpha, sigma). Tables of discrete betas, and formulas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.levels import Coordinate, Level, Number
from ldm.errors import ConfigError


class Scheduler(ABC):
    """alpha(t), sigma(t) and the timestep that the network is told, for t in [0, 1] (0 data, 1 noise).

    Every number is float64: in float32, t * 1000 - 1 misses table entries.
    """

    num_train_timesteps: int = 1000
    coordinate: Coordinate = "ratio"

    @abstractmethod
    def level(self, t: Number) -> Level:
        """The level at time t; a float gives floats, a (B,) tensor gives (B,) tensors."""

    @abstractmethod
    def level_at(self, ratio: Number) -> Level:
        """The level with this sigma/alpha, the ratio kept exact and the timestep found."""

    @abstractmethod
    def snap(self, t: Number) -> Number:
        """The nearest time that the scheduler has an entry for; formulas return t itself."""

    @abstractmethod
    def training_time(self, u: Tensor) -> Tensor:
        """u, uniform in (0, 1), as a training time."""


class Table(Scheduler):
    """A discrete variance-preserving schedule, read at any real index (Ho et al. 2020; Karras et al. 2022, C.3.4).

    Entry i belongs to t = (i + 1)/N. Between entries sigma/alpha is linear in the index; below entry 0 it falls
    linearly to 0 while the timestep stays at 0.
    """

    def __init__(self, betas: Tensor):
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ConfigError(
                f"betas must lie in (0, 1), these run from {betas.min():.3g} to {betas.max():.3g}: "
                "choose smaller beta_start and beta_end."
            )
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
        self.num_train_timesteps = len(betas)
        self.ratios = ((1 - alpha_bar) / alpha_bar).sqrt()  # sigma/alpha, (N,)
        # Index -1 stands for t = 0, where there is no noise.
        self._nodes = torch.cat([torch.zeros(1, dtype=torch.float64), self.ratios])

    def level(self, t: Number) -> Level:
        index = _as_double(t) * self.num_train_timesteps - 1
        index = torch.where((index - index.round()).abs() < 1e-9, index.round(), index)
        low = index.floor().clamp(-1, self.num_train_timesteps - 2).long()
        ratio = torch.lerp(self._nodes[low + 1], self._nodes[low + 2], index - low)
        return self._level(t, ratio, index.clamp(min=0.0))

    def level_at(self, ratio: Number) -> Level:
        wanted = _as_double(ratio)
        nodes = self.ratios.log()
        position = wanted.log().clamp(nodes[0], nodes[-1])
        low = (torch.searchsorted(nodes, position, right=True) - 1).clamp(0, self.num_train_timesteps - 2)
        index = low + (position - nodes[low]) / (nodes[low + 1] - nodes[low])
        return self._level(None, wanted, index, like=ratio)

    def snap(self, t: Number) -> Number:
        # Python's and torch's round are both half-to-even, as numpy's in the published grids.
        n = self.num_train_timesteps
        return (t * n - 1).round().add(1).div(n) if isinstance(t, Tensor) else (round(t * n - 1) + 1) / n

    def training_time(self, u: Tensor) -> Tensor:
        """Entry floor(u N), every entry equally likely."""
        return ((u.double() * self.num_train_timesteps).floor() + 1) / self.num_train_timesteps

    def _level(self, t: Number | None, ratio: Tensor, timestep: Tensor, like: Number | None = None) -> Level:
        alpha = (1 + ratio**2).rsqrt()
        sigma = torch.where(ratio.isinf(), 1.0, ratio * alpha)
        if t is None:
            t_tensor = torch.where(ratio < self.ratios[0], ratio / self.ratios[0], timestep + 1)
            t_tensor = t_tensor / self.num_train_timesteps
        else:
            t_tensor = _as_double(t)
        values = (t_tensor, alpha, sigma, timestep)
        if isinstance(like if t is None else t, Tensor):
            return Level(*values)
        return Level(*(v.item() for v in values))


class Linear(Table):
    """betas evenly spaced (Ho et al. 2020)."""

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000):
        super().__init__(torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64))


class ScaledLinear(Table):
    """Square roots of betas evenly spaced: Stable Diffusion 1 and 2 (Rombach et al. 2022)."""

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000):
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
        super().__init__(roots**2)


class Cosine(Table):
    """alpha_bar = cos^2 of time, betas capped (Nichol and Dhariwal 2021, Equation 17)."""

    def __init__(self, offset: float = 0.008, max_beta: float = 0.999, num_train_timesteps: int = 1000):
        t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


class Flow(Scheduler):
    """Rectified flow: alpha = 1 - t, sigma = t (Liu et al. 2022; Esser et al. 2024)."""

    coordinate: Coordinate = "sigma"

    def level(self, t: Number) -> Level:
        return Level(t, 1 - t, t, 1000 * t)

    def level_at(self, ratio: Number) -> Level:
        return self.level(ratio / (1 + ratio) if not math.isinf(float(_as_double(ratio).max())) else 1.0)

    def snap(self, t: Number) -> Number:
        return t

    def training_time(self, u: Tensor) -> Tensor:
        return u.double()


def _as_double(value: Number) -> Tensor:
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
