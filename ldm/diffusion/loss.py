"""What a denoiser makes of noised data, and its weighted squared error. Draws nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import Level
from ldm.diffusion.weightings import Weighting


@dataclass(frozen=True)
class Prediction:
    """One pass of a denoiser over noised data, with all that a loss may look at.

    x0, eps: (B,C,H,W), what was noised, and the noise; level: numbers of shape (B,); x_t, output: (B,C,H,W).
    """

    denoiser: Denoiser
    x0: Tensor
    eps: Tensor
    level: Level
    x_t: Tensor
    output: Tensor

    @property
    def jump(self) -> Tensor:  # (B,C,H,W)
        """The jump to x0: what the output takes the data to be."""
        return self.denoiser.x0(self.x_t, self.output, self.level)

    def error(self) -> Tensor:  # (B,)
        """|output - (a x0 + b eps)|^2, the mean over C, H, W of each sample."""
        target = self.denoiser.parameterization.target(self.x0, self.eps, self.level)
        return (self.output - target).square().flatten(1).mean(dim=1)

    def weight(self, weighting: Weighting) -> Tensor:  # (B,)
        """What a weighting gives to the error at these levels."""
        alpha, sigma = torch.as_tensor(self.level.alpha), torch.as_tensor(self.level.sigma)
        return weighting(alpha, sigma, self.denoiser.parameterization)

    def loss(self, weighting: Weighting) -> Tensor:  # (B,)
        error = self.error()
        return self.weight(weighting).to(error.dtype) * error

    def rows(self, chosen: slice) -> Prediction:
        """Some samples of the batch."""
        x0, eps, x_t, output = (v[chosen] for v in (self.x0, self.eps, self.x_t, self.output))
        level = Level(*(v[chosen] if isinstance(v, Tensor) else v for v in self.level))
        return Prediction(self.denoiser, x0, eps, level, x_t, output)


def predict(denoiser: Denoiser, x0: Tensor, cond: Condition, level: Level, eps: Tensor) -> Prediction:
    """Noises x0 to its levels and asks the denoiser: (B,C,H,W), Condition, (B,), (B,C,H,W)."""
    x_t = level.noised(x0, eps)
    return Prediction(denoiser, x0, eps, level, x_t, denoiser.output(x_t, level, cond))
