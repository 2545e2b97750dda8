"""Loss weights, functions of (alpha, sigma, parameterization) on the squared error of the network's output."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.parameterizations import Parameterization


class Simple:
    """1 everywhere: the plain squared error of the output (Ho et al. 2020, Equation 14)."""

    def __call__(self, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:  # (B,) -> (B,)
        return alpha.new_ones(alpha.shape)


class MinSNR:
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023), carried over to whatever the network predicts."""

    def __init__(self, gamma: float = 5.0):
        self.gamma = gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:  # (B,) -> (B,)
        weight = ((alpha / sigma) ** 2).clamp(max=self.gamma)
        return weight * parameterization.weight_of_x0_error(alpha, sigma)
