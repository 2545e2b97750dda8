"""Errors of pictures by their frequencies: what blur loses."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.training.losses.term import PictureTerm, Reconstructed


class FocalFrequency(PictureTerm):
    """The squared error of the spectra, each frequency weighed by how wrong it is (Jiang et al. 2021, Equation 8).

    The weights are the errors' own sizes to the power of `alpha`, over the picture's largest, without gradients.
    """

    likelihood = True

    def __init__(self, weight: float = 1.0, alpha: float = 1.0):
        super().__init__()
        self.weight, self.alpha = weight, alpha

    def forward(self, made: Reconstructed) -> Tensor:
        error = torch.fft.fft2((made.output - made.images).float(), norm="ortho")
        square = error.real.square() + error.imag.square()
        size = square.detach().sqrt() ** self.alpha
        largest = size.flatten(2).amax(dim=2)[..., None, None].clamp_min(1e-12)
        return ((size / largest).clamp(0, 1) * square).flatten(1).mean(dim=1)


class Wavelet(PictureTerm):
    """The absolute error of the details of a Haar pyramid, the mean over its levels.

    Each level halves: the details of 2x2 pixels (horizontal, vertical, diagonal) are compared, and their mean goes on.
    """

    likelihood = True

    def __init__(self, weight: float = 1.0, levels: int = 3):
        super().__init__()
        if levels < 1:
            raise ConfigError(f"module.losses.wavelet.levels={levels}: at least 1; 3 is usual.")
        self.weight, self.levels = weight, levels

    def forward(self, made: Reconstructed) -> Tensor:
        error, found = (made.output - made.images).float(), []
        for _ in range(self.levels):
            if min(error.shape[-2:]) < 2:
                break
            error, details = haar(error)
            found.append(details.abs().flatten(1).mean(dim=1))
        return torch.stack(found).mean(dim=0)


def haar(images: Tensor) -> tuple[Tensor, Tensor]:  # (B,C,H,W) -> (B,C,H/2,W/2), (B,3C,H/2,W/2)
    """The means and the three kinds of details of 2x2 pixels, orthonormal; an odd last row or column is left out."""
    height, width = images.shape[-2] // 2 * 2, images.shape[-1] // 2 * 2
    a, b = images[..., 0:height:2, 0:width:2], images[..., 0:height:2, 1:width:2]
    c, d = images[..., 1:height:2, 0:width:2], images[..., 1:height:2, 1:width:2]
    return (a + b + c + d) / 2, torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
