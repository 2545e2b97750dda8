"""What happens to latents between encoder and decoder in training, and only there.

Draws are functions of (seed, step, position), as all draws of training are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.devices import beside
from ldm.errors import ConfigError
from ldm.training.randomness import Draws, uniform


@dataclass(frozen=True)
class Place:
    """Where a micro-batch stands: the run's draws, optimizer steps so far, positions in the global batch."""

    draws: Draws
    step: int
    positions: range

    def uniform(self, purpose: str) -> Tensor:  # (B,) float64 in (0, 1)
        return uniform(self.draws.seed, purpose, self.step, self.positions)

    def normal(self, purpose: str, shape: torch.Size) -> Tensor:  # (B,*shape)
        return self.draws.normal(shape, purpose, self.step, self.positions)


class Perturbation:
    """(z, pictures) -> (what is decoded, what it is to become): (B,C,h,w) and (B,3,H,W)."""

    def __call__(self, z: Tensor, images: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must say what it does to latents.")


class Equivariance(Perturbation):
    """Turned and smaller latents are to be decoded into turned and smaller pictures (EQ-VAE: Kouzelis et al. 2025).

    In a share of the steps all of a step's latents and pictures are scaled by one number, drawn evenly, and turned by
    one, two or three quarters (Equation 6).

    share: of the steps. smallest: least scale, of the side. least_side: pixels that pictures keep in any case.
    """

    def __init__(self, share: float = 0.5, smallest: float = 0.25, least_side: int = 32):
        if not 0 <= share <= 1:
            raise ConfigError(f"module.perturbations.equivariance.share={share}: between 0 and 1.")
        if not 0 < smallest <= 1:
            raise ConfigError(f"module.perturbations.equivariance.smallest={smallest}: above 0, at most 1.")
        self.share, self.smallest, self.least_side = share, smallest, least_side

    def __call__(self, z: Tensor, images: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        chance, scale, turn = uniform(place.draws.seed, "equivariance", place.step, range(3)).tolist()
        if chance >= self.share:
            return z, images
        factor = images.shape[-1] // z.shape[-1]
        least = min(1.0, max(self.smallest, self.least_side / min(images.shape[-2:])))
        sides = [max(1, round(side * (least + scale * (1 - least)))) for side in z.shape[-2:]]
        quarters = 1 + int(turn * 3)
        small = F.interpolate(z, sides, mode="bilinear", antialias=True)
        target = F.interpolate(images, [side * factor for side in sides], mode="bilinear", antialias=True)
        return small.rot90(quarters, (2, 3)), target.rot90(quarters, (2, 3))


class LatentNoise(Perturbation):
    """Noise is added to the latents, so that the decoder forgives what diffusion gets wrong (RAE: Zheng et al. 2025).

    Each picture's noise has the deviation |N(0, std^2)| in units of the latents' own, that of the micro-batch.
    """

    def __init__(self, std: float = 0.2):
        if not 0 <= std < math.inf:
            raise ConfigError(f"module.perturbations.noise.std={std}: a number, at least 0.")
        self.std = std

    def __call__(self, z: Tensor, images: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        size = place.normal("latent_noise_size", torch.Size((1, 1, 1))).abs() * self.std
        noise = place.normal("latent_noise", z.shape[1:])
        return z + beside(size * noise, z) * z.detach().float().std().to(z.dtype), images


class ChannelDropout(Perturbation):
    """In a share of the pictures only the first channels are kept, a number drawn evenly, so that channels are ordered:
    the first ones hold the picture at large (Rippel et al. 2014; DC-AE 1.5: Chen et al. 2025).

    share: of the pictures. least: channels that are kept in any case.
    """

    def __init__(self, share: float = 0.5, least: int = 1):
        if not 0 <= share <= 1:
            raise ConfigError(f"module.perturbations.channel_dropout.share={share}: between 0 and 1.")
        if least < 1:
            raise ConfigError(f"module.perturbations.channel_dropout.least={least}: at least 1 channel is kept.")
        self.share, self.least = share, least

    def __call__(self, z: Tensor, images: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        channels = z.shape[1]
        least = min(self.least, channels)
        kept = least + (place.uniform("channels_kept") * (channels - least + 1)).long()
        kept = torch.where(place.uniform("channel_dropout") < self.share, kept, channels)
        mask = torch.arange(channels) < kept[:, None]
        return z * beside(mask.to(torch.float32), z)[..., None, None], images
