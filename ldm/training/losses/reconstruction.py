"""How far an autoencoder's pictures are from those that it was given."""

from __future__ import annotations

from torch import Tensor

from ldm.errors import ConfigError, nearest
from ldm.training.losses.term import PictureTerm

ERRORS = {
    "squared": lambda error: error.square(),
    "absolute": lambda error: error.abs(),
    "both": lambda error: error.abs() + error.square(),
}


class Reconstruction(PictureTerm):
    """The mean over pixels and channels of an error.

    error: squared (best PSNR, and by far the best in few steps), absolute (Stable Diffusion's, for use with perceptual
        terms) or both in equal parts.
    """

    def __init__(self, error: str = "squared"):
        super().__init__()
        if error not in ERRORS:
            raise ConfigError(
                f"reconstruction={error}: choose one of {', '.join(ERRORS)}.{nearest(error, list(ERRORS))}"
            )
        self.error = ERRORS[error]

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        return self.error(output - images).flatten(1).mean(dim=1)
