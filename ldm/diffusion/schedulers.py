"""Noise schedulers: time -> (alpha, sigma). Tables of discrete betas, and formulas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.levels import Coordinate, Level, Number
from ldm.errors import ConfigError
from ldm.untrusted import shown

_MOST_TIMESTEPS = 1_000_000  # what a table may have: a thousand times the usual number, and still 8 MB


def check_number(
    what: str, value: Any, low: float, high: float, example: float | str, whole: bool = False, remedy: str = "use"
) -> None:
    """ConfigError unless the value is a (whole) number from low to high; nothing is allocated for one that is not."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise ConfigError(
            f"{what}={shown(value)} must be a {'whole ' if whole else ''}number from {low:.7g} to {high:.7g}: "
            f"{remedy} {example}."
        )


class Scheduler(ABC):
    """alpha(t), sigma(t) and the timestep that the network is told, for t in [0, 1] (0 data, 1 noise).

    Every number is float64: in float32, t * 1000 - 1 misses table entries.
    """

    num_train_timesteps: int = 1000
    coordinate: Coordinate = "ratio"
    sigma_data: float | None = None  # where given, the network sees x_t divided by (alpha^2 sigma_data^2 + sigma^2)^0.5

    @property
    def first_time(self) -> float:
        """The time of the least noisy entry that is trained on."""
        return 1 / self.num_train_timesteps

    @abstractmethod
    def level(self, t: Number) -> Level:
        """The level at time t; a float gives floats, a (B,) tensor gives (B,) tensors."""

    @abstractmethod
    def level_at(self, ratio: Number) -> Level:
        """The level with this sigma/alpha, the ratio kept exact and the timestep found."""

    def level_at_position(self, position: Number) -> Level:
        """The level with this `Level.position(self.coordinate)`."""
        return self.level_at(position)

    def snap(self, t: Number) -> Number:
        """The nearest time that the scheduler has an entry for; formulas have all of them."""
        return t

    def training_time(self, u: Tensor) -> Tensor:
        """u in (0, 1) as a training time: tables go to entry floor(u N), formulas return u."""
        return u.double()


class Table(Scheduler):
    """A discrete variance-preserving schedule, read at any real index (Ho et al. 2020; Karras et al. 2022, C.3.4).

    Entry i belongs to t = (i + 1)/N. Between entries sigma/alpha is linear in the index; below entry 0 it falls
    linearly to 0 while the timestep stays at 0.

    zero_terminal_snr: the last entry becomes pure noise, alpha exactly 0, and the square roots of alpha_bar are
        stretched to fit (Lin et al. 2024, Algorithm 1). Nothing is interpolated between the last two entries then.
    """

    def __init__(self, betas: Tensor, zero_terminal_snr: bool = False):
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ConfigError(
                f"betas must lie in (0, 1), these run from {betas.min():.3g} to {betas.max():.3g}: "
                "choose smaller beta_start and beta_end."
            )
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
        if zero_terminal_snr:
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        self.num_train_timesteps = len(betas)
        if not bool((alpha_bar[1:] < alpha_bar[:-1]).all() and alpha_bar[-2] > 0):
            raise ConfigError(
                f"{len(betas)} betas from {betas.min():.3g} to {betas.max():.3g} leave no signal long before the last "
                "timestep: choose smaller beta_start and beta_end, or fewer num_train_timesteps."
            )
        self.ratios = ((1 - alpha_bar) / alpha_bar).sqrt()  # sigma/alpha, (N,); the last may be infinite
        # Index -1 stands for t = 0, where there is no noise.
        self._nodes = torch.cat([torch.zeros(1, dtype=torch.float64), self.ratios])

    def level(self, t: Number) -> Level:
        index = _as_double(t) * self.num_train_timesteps - 1
        index = torch.where((index - index.round()).abs() < 1e-9, index.round(), index)
        low = index.floor().clamp(-1, self.num_train_timesteps - 2).long()
        below, above = self._nodes[low + 1], self._nodes[low + 2]
        nearer = torch.where(index - low > 0.5, above, below)
        ratio = torch.where(above.isinf(), nearer, torch.lerp(below, above, index - low))
        return self._level(t, ratio, index.clamp(min=0.0))

    def level_at(self, ratio: Number) -> Level:
        wanted = _as_double(ratio)
        nodes = self.ratios.log()
        position = wanted.log().clamp(nodes[0], nodes[-1])
        low = (torch.searchsorted(nodes, position, right=True) - 1).clamp(0, self.num_train_timesteps - 2)
        fraction = (position - nodes[low]) / (nodes[low + 1] - nodes[low])
        index = low + torch.where(position.isinf(), 1.0, fraction)
        return self._level(None, wanted, index, like=ratio)

    def snap(self, t: Number) -> Number:
        # Python's and torch's round are both half-to-even, as numpy's in the published grids.
        # The inner rounding takes 499.4999999999 to 499.5.
        n = self.num_train_timesteps
        if isinstance(t, Tensor):
            return (t * n - 1).round(decimals=9).round().add(1).div(n)
        return (round(round(t * n - 1, 9)) + 1) / n

    def training_time(self, u: Tensor) -> Tensor:
        return ((u.double() * self.num_train_timesteps).floor() + 1) / self.num_train_timesteps

    def _level(self, t: Number | None, ratio: Tensor, timestep: Tensor, like: Number | None = None) -> Level:
        alpha = (1 + ratio**2).rsqrt()  # 0 at an infinite ratio
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

    def __init__(
        self,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        _check_table(num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        super().__init__(betas, zero_terminal_snr)


class ScaledLinear(Table):
    """Square roots of betas evenly spaced: Stable Diffusion 1 and 2 (Rombach et al. 2022)."""

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        _check_table(num_train_timesteps, beta_start=beta_start, beta_end=beta_end)
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
        super().__init__(roots**2, zero_terminal_snr)


class Cosine(Table):
    """alpha_bar = cos^2 of time, betas capped (Nichol and Dhariwal 2021, Equation 17)."""

    def __init__(
        self,
        offset: float = 0.008,
        max_beta: float = 0.999,
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        _check_table(num_train_timesteps, offset=offset, max_beta=max_beta)
        t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        super().__init__(_betas(alpha_bar, max_beta), zero_terminal_snr)


class Sigmoid(Table):
    """alpha_bar a falling sigmoid of time between `start` and `end` (Jabri et al. 2022, Algorithm 5), betas capped."""

    def __init__(
        self,
        start: float = -3.0,
        end: float = 3.0,
        temperature: float = 1.0,
        max_beta: float = 0.999,
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ):
        _check_table(num_train_timesteps, max_beta=max_beta)
        check_number("scheduler.end", end, -100, 100, 3)
        check_number("scheduler.start", start, -100, end - 1e-3, -3)
        check_number("scheduler.temperature", temperature, 1e-3, 1e3, 1)
        t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        first, last = torch.sigmoid(torch.tensor([start, end], dtype=torch.float64) / temperature)
        alpha_bar = (last - torch.sigmoid((start + t * (end - start)) / temperature)) / (last - first)
        super().__init__(_betas(alpha_bar, max_beta), zero_terminal_snr)


class Flow(Scheduler):
    """Rectified flow: alpha = 1 - sigma (Liu et al. 2022; Esser et al. 2024).

    shift: sigma = shift t/(1 + (shift - 1) t), more of the time at high noise, for larger pictures (Equation 23).
    """

    coordinate: Coordinate = "sigma"

    def __init__(self, shift: float = 1.0):
        check_number("scheduler.shift", shift, 1e-3, 1e3, "1, which leaves time as it is, or 3 for 1024 pixels")
        self.shift = shift

    def level(self, t: Number) -> Level:
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return Level(t, 1 - sigma, sigma, 1000 * sigma)

    def level_at(self, ratio: Number) -> Level:
        return self.level_at_position(1 - 1 / (1 + ratio))  # 1 at an infinite ratio

    def level_at_position(self, position: Number) -> Level:
        t = position / (self.shift - (self.shift - 1) * position)
        return Level(t, 1 - position, position, 1000 * position)


class EDM(Scheduler):
    """alpha = 1, sigma^(1/rho) linear in t from sigma_min to sigma_max (Karras et al. 2022, Equation 5).

    sigma_data is 1 because latents are standardised. Below sigma_min the network is told sigma_min's timestep.
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float | None = 1.0
    ):
        check_number("scheduler.sigma_max", sigma_max, 1e-5, 1e6, 80)
        check_number("scheduler.sigma_min", sigma_min, 1e-6, 0.999 * sigma_max, 0.002)
        check_number("scheduler.rho", rho, 0.1, 100, 7)
        check_number("scheduler.sigma_data", 1 if sigma_data is None else sigma_data, 1e-3, 1e3, 1)
        self.sigma_min, self.sigma_max, self.rho, self.sigma_data = sigma_min, sigma_max, rho, sigma_data
        self._low, self._high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    @property
    def first_time(self) -> float:
        return 0.0

    def level(self, t: Number) -> Level:
        return self._level(t, (self._low + t * (self._high - self._low)) ** self.rho)

    def level_at(self, ratio: Number) -> Level:
        inside = _as_double(ratio).clamp(self.sigma_min, self.sigma_max)
        t = (inside ** (1 / self.rho) - self._low) / (self._high - self._low)
        return self._level(t if isinstance(ratio, Tensor) else t.item(), ratio)

    def _level(self, t: Number, sigma: Number) -> Level:
        known = _as_double(sigma).clamp(self.sigma_min, self.sigma_max).log() / 4
        if isinstance(sigma, Tensor):
            return Level(t, torch.ones_like(sigma), sigma, known)
        return Level(t, 1.0, sigma, known.item())


def _check_table(num_train_timesteps: int, **betas: float) -> None:
    check_number("scheduler.num_train_timesteps", num_train_timesteps, 2, _MOST_TIMESTEPS, 1000, whole=True)
    for name, value in betas.items():
        check_number(f"scheduler.{name}", value, 0, 1, "the default")


def _betas(alpha_bar: Tensor, max_beta: float) -> Tensor:
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def _as_double(value: Number) -> Tensor:
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
