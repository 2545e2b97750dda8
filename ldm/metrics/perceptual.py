"""How different an autoencoder's pictures look from those that it was given, and whether they are as sharp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.features.vgg import LPIPS, RANDOM
from ldm.metrics.reconstruction import OfReconstructions


class PerceptualReconstruction(OfReconstructions):
    """LPIPS (Zhang et al. 2018), the mean over pictures (B,3,H,W) in [-1, 1], and the energy of their gradients over
    the originals': below 1 where texture is lost, above where it is made up.

    features, heads: as `LPIPS` takes them; with features=random the score is lpips_random, which compares with no
        published one.
    """

    def __init__(self, features: str = RANDOM, heads: str | None = None):
        super().__init__()
        self.distance = LPIPS(features, heads, "metric.perceptual.features")
        self.name = "lpips_random" if self.distance.random else "lpips"
        self.scores = tuple(f"reconstruction/{k}" for k in (self.name, f"{self.name}/se", "gradient_energy"))

    def update(self, images: Tensor, target: Tensor) -> None:
        """Reconstructions and what they should be."""
        with torch.no_grad():
            rows = [self.distance(images.float(), target.float()), gradient_energy(images), gradient_energy(target)]
        self.values.append(torch.stack(rows, dim=1))

    def compute(self) -> dict[str, float]:
        distance, ours, theirs = self.rows().unbind(dim=1)
        error = float(distance.std() / math.sqrt(len(distance))) if len(distance) > 1 else math.nan
        energy = float(ours.sum() / theirs.sum()) if theirs.sum() > 0 else math.nan
        return {self.name: float(distance.mean()), f"{self.name}/se": error, "gradient_energy": energy}


def gradient_energy(images: Tensor) -> Tensor:  # (B,3,H,W) -> (B,)
    """The mean squared difference of neighbouring pixels, over both directions."""
    down, right = images.float().diff(dim=2), images.float().diff(dim=3)
    return (down.square().mean(dim=(1, 2, 3)) + right.square().mean(dim=(1, 2, 3))) / 2
