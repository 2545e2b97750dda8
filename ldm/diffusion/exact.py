"""Data whose ideal denoiser has a closed form: ground truth for schedulers, samplers and training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.levels import Level, Number, right_pad


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


class GaussianMixture:
    """x0 ~ sum_k weights_k N(means_k, stds_k^2 I): several Gaussians, each round, over whole samples.

    means: (K, C, H, W); stds, weights: (K,). With stds 0 the data are K points: the training set itself, whose ideal
    denoiser is what a network without limits would learn by heart.
    """

    def __init__(self, means: Tensor, stds: Sequence[float] | Tensor, weights: Sequence[float] | Tensor | None = None):
        self.means = means
        self.stds = torch.as_tensor(stds, dtype=means.dtype)
        given = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        self.log_weights = (given / given.sum()).log().to(means.dtype)

    def __call__(self, x_t: Tensor, level: Level, cond: Condition | None = None) -> Tensor:
        return self.denoise(x_t, level)

    def denoise(self, x_t: Tensor, level: Level) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        """E[x0 | x_t]: every Gaussian's own answer, weighted by how likely x_t is to come from it."""
        flat, means = x_t.flatten(1), self.means.flatten(1)  # (B, D), (K, D)
        alpha, sigma = (_column(v, flat) for v in (level.alpha, level.sigma))  # (B, 1) or floats
        spread = alpha**2 * self.stds**2 + sigma**2  # variance of x_t within each Gaussian, (B, K) or (K,)
        # |x - alpha m|^2 multiplied out: no (B, K, D) tensor.
        squares = flat.square().sum(1, keepdim=True) + alpha**2 * means.square().sum(1) - 2 * alpha * flat @ means.T
        log_p = self.log_weights - squares / (2 * spread) - flat.shape[1] / 2 * torch.log(spread)
        share = log_p.softmax(dim=1)  # (B, K)
        towards_mean, towards_x = sigma**2 / spread, alpha * self.stds**2 / spread
        x0 = (share * towards_mean) @ means + (share * towards_x).sum(1, keepdim=True) * flat
        return x0.view_as(x_t)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + right_pad(self.stds[chosen], noise) * noise

    def irreducible_loss(self, level: Level, n: int, generator: torch.Generator) -> Tensor:  # -> (n,)
        """The ideal denoiser's squared error of x0 on n draws; its mean estimates the smallest possible loss."""
        x0 = self.sample(n, generator)
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        x_t = level.noised(x0, eps)
        return (self.denoise(x_t, level) - x0).square().flatten(1).mean(1)


def _column(value: Number, like: Tensor) -> Number:
    return value.to(like.dtype).reshape(-1, 1) if isinstance(value, Tensor) else value
