"""How different pictures look: an autoencoder's from those that it was given, and those of one caption."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.errors import ConfigError
from ldm.features.network import digest_of
from ldm.features.vgg import LPIPS, RANDOM
from ldm.metrics.distances.interval import mean_of
from ldm.metrics.evaluation import Evaluation
from ldm.metrics.reconstruction import OfReconstructions
from ldm.pictures import to_unit


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


class PerceptualDiversity(Metric):
    """The mean LPIPS between pictures that are drawn of one caption, over captions (Zhu et al. 2017): near 0 where the
    model knows one picture a caption.

    num_captions, num_images: pictures of how many captions, and of each, are drawn for it beside the others.
    features, heads: as `LPIPS` takes them.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self, features: str = RANDOM, heads: str | None = None, num_captions: int = 16, num_images: int = 4):
        super().__init__()
        if num_captions < 2 or num_images < 2:
            raise ConfigError(
                f"num_captions={num_captions}, num_images={num_images}: differences need at least 2 pictures of each "
                "of at least 2 captions."
            )
        self.distance = LPIPS(features, heads, "metric.diversity.features")
        self._weights = digest_of(self.distance)
        self.num_captions, self.num_images = num_captions, num_images
        self.name = "lpips_diversity_random" if self.distance.random else "lpips_diversity"
        self.scores = tuple(
            f"{half}/{self.name}{end}" for half in ("seen", "unseen", "val") for end in ("", "/low", "/high", "/n")
        )
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Pictures of one caption (N,3,H,W) in [-1, 1]."""
        first, second = zip(*combinations(range(len(images)), 2), strict=True)
        with torch.no_grad():
            self.values.append(self.distance(images[list(first)], images[list(second)]).mean().reshape(1))

    def compute(self) -> dict[str, float]:
        values = dim_zero_cat(self.values).double().cpu()
        return mean_of(values).named(self.name) | {f"{self.name}/n": float(len(values))}

    def score(self, evaluation: Evaluation) -> dict[str, float]:
        """Of each half of the captions: val/lpips_diversity and so on."""
        found: dict[str, float] = {}
        self.distance.to(evaluation.device)
        for half, drawn in evaluation.drawn.items() if evaluation.draw is not None else ():
            self.reset()
            captions = list(dict.fromkeys(drawn.everyone))[: self.num_captions]
            for i in range(evaluation.group.rank, len(captions), evaluation.group.size):
                seeds = [i * self.num_images + k for k in range(self.num_images)]
                pictures = evaluation.draw([captions[i]] * self.num_images, seeds)
                self.update(to_unit(pictures).to(evaluation.device))
            found |= {f"{half}/{k}": v for k, v in self.compute().items()} if len(captions) > 1 else {}
        return found

    def card(self, name: str) -> dict[str, Any]:
        """What a score was measured with, but for how the pictures were drawn."""
        return {
            "network": "VGG16, random" if self.distance.random else "VGG16, LPIPS 0.1",
            "network_weights": self._weights,
            "pictures of a caption": self.num_images,
            "interval": "over captions, 95 %",
        }
