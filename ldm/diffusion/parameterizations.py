"""What the network predicts: a x0 + b eps. Each parameterization is its two numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ldm.diffusion.levels import Level, Number, right_pad, weighted_sum
from ldm.diffusion.schedulers import Scheduler
from ldm.errors import ConfigError


class Parameterization(ABC):
    """The network's output is an estimate of a x0 + b eps; targets and the jump to x0 follow from (a, b)."""

    name: str
    sigma_data: float | None = None  # where given, the network sees x_t divided by (alpha^2 sigma_data^2 + sigma^2)^0.5

    @abstractmethod
    def coefficients(self, alpha: Number, sigma: Number) -> tuple[Number, Number]:
        """(a, b) at this level."""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:  # (B,C,H,W), (B,C,H,W) -> (B,C,H,W)
        a, b = self.coefficients(right_pad(level.alpha, x0), right_pad(level.sigma, x0))
        return a * x0 + b * eps

    def x0(self, x_t: Tensor, output: Tensor, level: Level) -> Tensor:  # (B,C,H,W), (B,C,H,W) -> (B,C,H,W)
        """The jump to x0: (b x_t - sigma out) / (alpha b - sigma a)."""
        alpha, sigma = right_pad(level.alpha, x_t), right_pad(level.sigma, x_t)
        a, b = self.coefficients(alpha, sigma)
        scale = alpha * b - sigma * a
        return weighted_sum((b / scale, x_t), (-sigma / scale, output))

    def determinant(self, alpha: Number, sigma: Number) -> Number:
        """alpha b - sigma a: (sigma/this)^2 turns a weight on the error of x0 into one on the error of the output."""
        a, b = self.coefficients(alpha, sigma)
        return alpha * b - sigma * a

    def check(self, scheduler: Scheduler) -> None:  # noqa: B027 (most pairs have nothing to refuse)
        """Raises ConfigError where the pair with `scheduler` cannot be trained."""


class Eps(Parameterization):
    """The noise (Ho et al. 2020)."""

    name = "eps"

    def coefficients(self, alpha, sigma):
        return 0.0, 1.0

    def check(self, scheduler: Scheduler) -> None:
        if scheduler.level(1.0).alpha <= 0:
            name = type(scheduler).__name__
            raise ConfigError(
                f"parameterization=eps cannot start from pure noise: {name} has alpha = 0 at t = 1, "
                "so x0 = (x_t - sigma eps)/alpha does not exist there. Use parameterization=v (or velocity), or a "
                "scheduler that ends above alpha = 0 (scheduler=scaled_linear, scheduler=cosine)."
            )


class X0(Parameterization):
    """The clean latent."""

    name = "x0"

    def coefficients(self, alpha, sigma):
        return 1.0, 0.0


class V(Parameterization):
    """The velocity on the circle, alpha eps - sigma x0 (Salimans and Ho 2022), normalised off the circle."""

    name = "v"

    def coefficients(self, alpha, sigma):
        norm = (alpha**2 + sigma**2) ** 0.5
        return -sigma / norm, alpha / norm


class Velocity(Parameterization):
    """eps - x0, the velocity of rectified flow (Liu et al. 2022)."""

    name = "velocity"

    def coefficients(self, alpha, sigma):
        return -1.0, 1.0


class EDM(Parameterization):
    """The preconditioned network of Karras et al. 2022 (Table 1): unit variance in and out at every level.

    c_skip, c_out and c_in follow for any alpha: x0 = (alpha sigma_data^2/s^2) x_t + (sigma sigma_data/s) out,
    s^2 = alpha^2 sigma_data^2 + sigma^2.
    """

    name = "edm"

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data: float = sigma_data

    def coefficients(self, alpha, sigma):
        s = (alpha**2 * self.sigma_data**2 + sigma**2) ** 0.5
        return sigma / (self.sigma_data * s), -alpha * self.sigma_data / s
