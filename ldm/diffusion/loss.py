"""The training loss: weighted squared error of the network's output. Draws nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import Level, right_pad
from ldm.diffusion.weightings import Weighting


def diffusion_loss(
    denoiser: Denoiser, weighting: Weighting, x0: Tensor, cond: Condition, level: Level, eps: Tensor
) -> Tensor:  # (B,C,H,W), Condition, (B,), (B,C,H,W) -> (B,)
    """weight |out - (a x0 + b eps)|^2, the mean over C, H, W of each sample."""
    x_t = right_pad(level.alpha, x0) * x0 + right_pad(level.sigma, x0) * eps
    error = denoiser.output(x_t, level, cond) - denoiser.parameterization.target(x0, eps, level)
    weight = weighting(torch.as_tensor(level.alpha), torch.as_tensor(level.sigma), denoiser.parameterization)
    return weight.to(error.dtype) * error.square().flatten(1).mean(dim=1)
