"""Latents that a frozen vision encoder would recognise (Yao et al. 2025, "Reconstruction vs. Generation", VA-VAE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoders.kl import Autoencoder
from ldm.errors import ConfigError
from ldm.features.vision import VisionTokens
from ldm.training.losses.term import PictureTerm, Reconstructed


class LatentAlignment(PictureTerm):
    """The vision foundation model loss (Equations 5 to 10), weighed at the encoder's last layer.

    Place by place the projected latent is to have at least the cosine 1 - cosine_margin with the encoder's token, and
    the cosines of any two places' latents those of their tokens, up to `distance_margin`.

    encoder: hub id or folder, as `VisionTokens` takes it.
    """

    adaptive = "encoder"
    of_latents = True

    def __init__(
        self,
        encoder: str,
        weight: float = 0.1,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
    ):
        super().__init__()
        for name, margin in (("cosine_margin", cosine_margin), ("distance_margin", distance_margin)):
            if not 0 <= margin < 2:
                raise ConfigError(f"module.losses.latent_alignment.{name}={margin}: between 0 and 2, as cosines are.")
        self.weight, self.cosine_margin, self.distance_margin = weight, cosine_margin, distance_margin
        self.tokens = VisionTokens(encoder, "module.losses.latent_alignment.encoder")

    def bind(self, autoencoder: Autoencoder) -> None:
        self.projector = nn.Linear(len(autoencoder.latents.mean), self.tokens.width, bias=False)

    def start(self) -> None:
        self.tokens.start()

    def forward(self, made: Reconstructed) -> Tensor:
        z = made.encoded.flatten(2).transpose(1, 2).float()  # (B,N,C)
        tokens = self.tokens(made.originals / 2 + 0.5, *made.encoded.shape[2:]).float()
        cosine = F.cosine_similarity(self.projector(z), tokens, dim=-1)
        near = F.relu(1 - self.cosine_margin - cosine).mean(dim=1)
        apart = (_cosines(z) - _cosines(tokens)).abs()
        return near + F.relu(apart - self.distance_margin).flatten(1).mean(dim=1)


def _cosines(places: Tensor) -> Tensor:  # (B,N,D) -> (B,N,N)
    places = F.normalize(places, dim=-1)
    return torch.bmm(places, places.transpose(1, 2))
