"""How far an autoencoder's pictures are from those that it was given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError, nearest
from ldm.training.losses.term import PictureTerm, Reconstructed

HUBER = 0.1  # where its errors turn from squares into absolute values, pictures being in [-1, 1]
ERRORS = {
    "squared": lambda error: error.square(),
    "absolute": lambda error: error.abs(),
    "both": lambda error: error.abs() + error.square(),
    "huber": lambda error: F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=HUBER) / HUBER,
}


class Reconstruction(PictureTerm):
    """The mean over pixels and channels of an error.

    error: squared (best PSNR, and by far the best in few steps), absolute (Stable Diffusion's, for use with perceptual
        terms), both in equal parts, or huber: absolute, but squared below 0.1.
    learnt_variance: the likelihood of the picture, this and the perceptual terms together, is divided by exp(s), and s
        is added: -log p of a Laplace or normal distribution whose scale is learnt (Rombach et al. 2022's code; there s
        is in no optimizer and stays 0).
    """

    likelihood = True

    def __init__(self, error: str = "squared", learnt_variance: bool = False):
        super().__init__()
        if error not in ERRORS:
            raise ConfigError(
                f"reconstruction={error}: choose one of {', '.join(ERRORS)}.{nearest(error, list(ERRORS))}"
            )
        self.error = ERRORS[error]
        if learnt_variance:
            self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, made: Reconstructed) -> Tensor:
        return self.error(made.output - made.images).flatten(1).mean(dim=1)
