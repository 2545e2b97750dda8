"""Raw latents (what the autoencoder speaks) and standardised ones (what diffusion speaks), and the map between them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ldm.errors import ConfigError


class Posterior:
    """q(z | image) = N(mean, exp(logvar)), one Gaussian a latent pixel and channel (Kingma & Welling 2014).

    logvar is clamped to [-30, 20] as in Stable Diffusion. At least float32 whatever the encoder ran in: the KL term
    subtracts numbers of nearly equal size.
    """

    def __init__(self, mean: Tensor, logvar: Tensor):  # (B,C,H,W), (B,C,H,W)
        dtype = torch.promote_types(mean.dtype, torch.float32)
        self.mean = mean.to(dtype)
        self.logvar = logvar.to(dtype).clamp(-30.0, 20.0)

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:  # (B,2C,H,W): means, then log variances
        return cls(*moments.chunk(2, dim=1))

    def moments(self) -> Tensor:  # -> (B,2C,H,W)
        return torch.cat([self.mean, self.logvar], dim=1)

    def mode(self) -> Tensor:  # -> (B,C,H,W)
        return self.mean

    def sample(self, eps: Tensor) -> Tensor:  # (B,C,H,W) standard normal -> (B,C,H,W)
        return self.mean + torch.exp(0.5 * self.logvar) * eps

    def kl(self) -> Tensor:  # -> (B,)
        """KL(q || N(0, 1)) in nats an image: summed over channels and pixels."""
        terms = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return terms.flatten(1).sum(dim=1)


class Point(Posterior):
    """All mass on one z: what an autoencoder says that adds no noise. Its moments are z alone."""

    def __init__(self, z: Tensor):  # (B,C,H,W)
        self.mean = z.to(torch.promote_types(z.dtype, torch.float32))
        self.logvar = torch.full_like(self.mean, -torch.inf)

    @classmethod
    def from_moments(cls, moments: Tensor) -> Point:  # (B,C,H,W)
        return cls(moments)

    def moments(self) -> Tensor:  # -> (B,C,H,W)
        return self.mean

    def sample(self, eps: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        return self.mean


class LatentSpace(nn.Module):
    """x0 = (z - mean) / scale for each channel, and a linear picture of x0; both travel with the autoencoder's weights.

    All buffers are NaN until they are measured, loaded or set, so nobody diffuses in units that were never chosen.
    """

    mean: Tensor
    scale: Tensor
    preview_weight: Tensor
    preview_bias: Tensor

    def __init__(self, channels: int, one_scale: bool = False):  # one_scale: the same in every channel
        super().__init__()
        self.one_scale = one_scale
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        self.register_buffer("scale", torch.full((channels,), torch.nan))
        self.register_buffer("preview_weight", torch.full((3, channels), torch.nan))
        self.register_buffer("preview_bias", torch.full((3,), torch.nan))
        self._seen_measured = False
        self.register_load_state_dict_post_hook(_look_again)

    @property
    def measured(self) -> bool:
        """Whether mean and scale are known; looked up once, because each look at a GPU's numbers makes it wait."""
        if not self._seen_measured and not self.scale.is_meta:
            self._seen_measured = bool(torch.isfinite(self.mean).all() and torch.isfinite(self.scale).all())
        return self._seen_measured or self.scale.is_meta

    @property
    def has_preview(self) -> bool:
        return bool(torch.isfinite(self.preview_weight).all())

    def standardise(self, z: Tensor) -> Tensor:  # (B,C,H,W) raw -> (B,C,H,W) x0
        self.require_measured()
        return (z - _per_channel(self.mean)) / _per_channel(self.scale)

    def restore(self, x0: Tensor) -> Tensor:  # (B,C,H,W) x0 -> (B,C,H,W) raw
        self.require_measured()
        return x0 * _per_channel(self.scale) + _per_channel(self.mean)

    def preview(self, x0: Tensor) -> Tensor:  # (B,C,H,W) -> (B,3,H,W) in [-1, 1]
        """A small linear picture of x0, for the price of one 1x1 convolution instead of a decoder."""
        if not self.has_preview:
            raise ConfigError(
                "the autoencoder has no linear preview yet: run latents.fit_preview, or decode x0 instead."
            )
        rgb = einsum(x0, self.preview_weight, "b c h w, rgb c -> b rgb h w") + _per_channel(self.preview_bias)
        return rgb.clamp(-1.0, 1.0)

    @torch.no_grad()
    def measure(self, batches: Iterable[Posterior]) -> None:
        """Mean and standard deviation of each channel over images, pixels and the posteriors' own noise.

        With `one_scale` the deviation is the root mean square of the channels': which latent is nearest to which stays.
        Law of total variance, Var z = Var(mean) + E exp(logvar): exact, so nothing is drawn. Sums are float64.
        """
        count = 0
        total, square, noise = torch.zeros(3, dtype=torch.float64)
        for posterior in batches:
            mean = posterior.mean.double()
            count += mean.numel() // mean.shape[1]
            total = total + mean.sum(dim=(0, 2, 3))
            square = square + mean.square().sum(dim=(0, 2, 3))
            noise = noise + posterior.logvar.double().exp().sum(dim=(0, 2, 3))
        if count == 0:
            raise ConfigError(
                "the latents cannot be measured on an empty data set: give data.shards with images in them."
            )
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0.0) + noise / count
        if self.one_scale:
            variance = variance.mean().expand_as(variance)
        self.set(mean, variance.sqrt())

    @torch.no_grad()
    def set(self, mean: Tensor | float, scale: Tensor | float) -> None:
        """Fix the units by hand: Stable Diffusion's are mean 0 and scale 1/0.18215."""
        self.mean.copy_(torch.as_tensor(mean))
        self.scale.copy_(torch.as_tensor(scale))
        self._seen_measured = False

    @torch.no_grad()
    def fit_preview(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Least squares from x0 to images averaged down to its size; pairs of (B,C,h,w) and (B,3,H,W) in [-1, 1]."""
        gram, target = torch.zeros(2, dtype=torch.float64)
        for x0, images in pairs:
            height, width = x0.shape[-2:]
            small = F.adaptive_avg_pool2d(images.double(), (height, width))
            inputs = rearrange(F.pad(x0.double(), (0, 0, 0, 0, 0, 1), value=1.0), "b c h w -> (b h w) c")  # 1: the bias
            gram = gram + inputs.mT @ inputs
            target = target + inputs.mT @ rearrange(small, "b rgb h w -> (b h w) rgb")
        if gram.ndim == 0:
            raise ConfigError("the preview cannot be fitted to no images: give data.shards with images in them.")
        solution = torch.linalg.pinv(gram, hermitian=True) @ target  # pinv: a channel that never varies gets no weight
        self.preview_weight.copy_(solution[:-1].mT)
        self.preview_bias.copy_(solution[-1])

    def require_measured(self) -> None:
        if not self.measured:
            raise ConfigError(
                "the autoencoder's latents have no mean and scale yet, so x0 has no units: train the autoencoder with "
                "module=autoencoder (it measures them at the end), or, for a published Stable Diffusion autoencoder, "
                "set mean 0 and scale 1/0.18215."
            )


def _per_channel(values: Tensor) -> Tensor:  # (C,) -> (C,1,1)
    return rearrange(values, "c -> c 1 1")


def _look_again(space: nn.Module, _incompatible: object) -> None:
    assert isinstance(space, LatentSpace)
    space._seen_measured = False
