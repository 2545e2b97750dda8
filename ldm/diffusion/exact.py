"""Data whose ideal denoiser has a closed form: ground truth for schedulers, samplers and training."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.levels import Level, right_pad


class Gaussian:
    """x0 ~ N(mean, std^2), independent entries; mean and std broadcast against (B, C, H, W)."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def denoise(self, x_t: Tensor, level: Level) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        """E[x0 | x_t] = (sigma^2 mean + alpha std^2 x_t) / (alpha^2 std^2 + sigma^2)."""
        alpha, sigma = right_pad(level.alpha, x_t), right_pad(level.sigma, x_t)
        return (sigma**2 * self.mean + alpha * self.std**2 * x_t) / (alpha**2 * self.std**2 + sigma**2)

    def __call__(self, x_t: Tensor, level: Level, cond: Condition | None = None) -> Tensor:
        return self.denoise(x_t, level)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        shape = torch.broadcast_shapes(self.mean.shape, self.std.shape)
        noise = torch.randn((n, *shape[1:]), generator=generator, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def flow(self, x_t: Tensor, level: Level, to: Level) -> Tensor:
        """Where the probability-flow ODE (Song et al. 2021) carries x_t: the exact answer for every solver."""
        spread = self._spread(to) / self._spread(level)
        return to.alpha * self.mean + spread * (x_t - level.alpha * self.mean)

    def irreducible_loss(self, level: Level) -> Tensor:
        """Smallest possible squared error of x0 at this level: the variance of x0 given x_t."""
        return self.std**2 * level.sigma**2 / self._spread(level) ** 2

    def _spread(self, level: Level) -> Tensor:
        return (level.alpha**2 * self.std**2 + level.sigma**2) ** 0.5
