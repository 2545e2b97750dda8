"""The training loss: weighted squared error of the network's output. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import Level, Number, right_pad
from ldm.diffusion.parameterizations import Parameterization

Weighting = Callable[[Number, Number, Parameterization], Tensor]


def diffusion_loss(
    denoiser: Denoiser, weighting: Weighting, x0: Tensor, cond: Condition, level: Level, eps: Tensor
) -> Tensor:  # (B,C,H,W), Condition, (B,), (B,C,H,W) -> (B,)
    """weight |out - (a x0 + b eps)|^2, the mean over C, H, W of each sample."""
    x_t = right_pad(level.alpha, x0) * x0 + right_pad(level.sigma, x0) * eps
    error = denoiser.output(x_t, level, cond) - denoiser.parameterization.target(x0, eps, level)
    weight = weighting(level.alpha, level.sigma, denoiser.parameterization)
    return weight.to(error.dtype) * error.square().flatten(1).mean(dim=1)
