"""How different two pictures look to a network that has learnt to see."""

from __future__ import annotations

from torch import Tensor

from ldm.features.frozen import Frozen
from ldm.features.vgg import LPIPS
from ldm.training.losses.term import PictureTerm, Reconstructed


class Perceptual(PictureTerm):
    """LPIPS on VGG16 (Zhang et al. 2018), as the published autoencoders are trained with (Esser et al. 2021).

    features, heads: as `LPIPS` takes them. With features=random it is logged as perceptual_random.
    The networks stay as they are and are in no checkpoint.
    """

    likelihood = True

    def __init__(self, features: str, heads: str | None = None, weight: float = 1.0):
        super().__init__()
        self.weight = weight
        network = LPIPS(features, heads, "module.losses.perceptual.features")
        self.note = "_random" if network.random else ""
        self.network = Frozen(network)

    def forward(self, made: Reconstructed) -> Tensor:
        return self.network(made.output, made.images)
