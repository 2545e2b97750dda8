"""Loss weights, functions of (alpha, sigma, parameterization) on the squared error of the network's output.

Most are published as weights on the error of x0 or of eps. They are carried over by the squared slope of the jump,
(sigma/determinant)^2, multiplied out so that nothing is infinite at SNR 0 or at sigma near 0.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

from torch import Tensor

from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedulers import Scheduler


class Weighting(ABC):
    @abstractmethod
    def __call__(self, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:
        """(B,) levels -> (B,) weights."""

    def check(self, scheduler: Scheduler) -> None:  # noqa: B027 (most have nothing to say)
        """Warns where the weighting leaves out a part of the schedule."""


class Simple(Weighting):
    """1 everywhere: the plain squared error of the output (Ho et al. 2020, Equation 14)."""

    def __call__(self, alpha, sigma, parameterization):
        return alpha.new_ones(alpha.shape)


class X0Uniform(Weighting):
    """The plain squared error of x0."""

    def __call__(self, alpha, sigma, parameterization):
        return (sigma / parameterization.determinant(alpha, sigma)) ** 2


class SNR(Weighting):
    """SNR on the error of x0, which is the plain squared error of eps (Kingma et al. 2021)."""

    def __call__(self, alpha, sigma, parameterization):
        return (alpha / parameterization.determinant(alpha, sigma)) ** 2


class Velocity(Weighting):
    """The plain squared error of eps - x0, rectified flow's loss (Liu et al. 2022), whatever the network predicts."""

    def __call__(self, alpha, sigma, parameterization):
        return ((alpha + sigma) / parameterization.determinant(alpha, sigma)) ** 2


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023)."""

    def __init__(self, gamma: float = 5.0):
        self.gamma = gamma

    def __call__(self, alpha, sigma, parameterization):
        weight = (alpha**2).minimum(self.gamma * sigma**2)
        return weight / parameterization.determinant(alpha, sigma) ** 2

    def check(self, scheduler: Scheduler) -> None:
        if scheduler.level(1.0).alpha == 0:
            warnings.warn(
                "weighting=min_snr gives weight 0 to pure noise, so the first sampling step of this scheduler, whose "
                "terminal SNR is 0, is never trained. weighting=simple trains it.",
                stacklevel=2,
            )


class P2(Weighting):
    """1/(k + SNR)^gamma on the error of eps (Choi et al. 2022, Equation 8)."""

    def __init__(self, k: float = 1.0, gamma: float = 1.0):
        self.k, self.gamma = k, gamma

    def __call__(self, alpha, sigma, parameterization):
        damping = (sigma**2 / (self.k * sigma**2 + alpha**2)) ** self.gamma
        return damping * (alpha / parameterization.determinant(alpha, sigma)) ** 2


class Debiased(Weighting):
    """1/SNR^0.5 on the error of eps (Yu et al. 2024)."""

    def __call__(self, alpha, sigma, parameterization):
        return alpha * sigma / parameterization.determinant(alpha, sigma) ** 2


class EDM(Weighting):
    """(sigma^2 + sigma_data^2)/(sigma sigma_data)^2 on the error of x0 (Karras et al. 2022): 1 for edm outputs."""

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = sigma_data

    def __call__(self, alpha, sigma, parameterization):
        spread = alpha**2 * self.sigma_data**2 + sigma**2
        return spread / (self.sigma_data * parameterization.determinant(alpha, sigma)) ** 2
