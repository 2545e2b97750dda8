"""How well an autoencoder gives its pictures back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

PSNR_MAX = 100.0  # an exact copy has an infinite one, which no mean survives


class Reconstruction(Metric):
    """PSNR in dB and SSIM, each the mean over pictures (B, 3, H, W) in [-1, 1], with its standard error."""

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(2, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, images: Tensor, target: Tensor) -> None:
        """Reconstructions and what they should be; both are measured as pixels in [0, 1]."""
        images, target = (((x.float() + 1) / 2).clamp(0, 1) for x in (images, target))
        values = torch.stack([psnr(images, target), ssim(images, target)], dim=1).double()
        self.total += values.sum(dim=0)
        self.squares += values.square().sum(dim=0)
        self.count += len(values)

    def compute(self) -> dict[str, float]:
        """{psnr, psnr/se, ssim, ssim/se, n}."""
        n = int(self.count)
        result: dict[str, float] = {}
        for name, total, squares in zip(["psnr", "ssim"], self.total.tolist(), self.squares.tolist(), strict=True):
            mean = total / n if n else math.nan
            variance = max(0.0, squares - n * mean * mean) / (n - 1) if n > 1 else math.nan
            result |= {name: mean, f"{name}/se": math.sqrt(variance / n) if n > 1 else math.nan}
        return result | {"n": float(n)}


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) dB, at most `PSNR_MAX`."""
    error = (images - target).square().flatten(1).mean(dim=1)
    return -10 * error.clamp_min(10 ** (-PSNR_MAX / 10)).log10()


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) structural similarity (Wang et al. 2004: Gaussian window of 11 pixels)."""
    value = structural_similarity_index_measure(images, target, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(images))
