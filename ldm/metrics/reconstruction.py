"""How well an autoencoder gives its pictures back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.utilities import dim_zero_cat

from ldm.metrics.evaluation import Evaluation

PSNR_MAX = 100.0  # an exact copy has an infinite one, which no mean survives


class OfReconstructions(Metric):
    """A number or several of each validation picture (B,3,H,W) in [-1, 1] and what the autoencoder makes of it: rows of
    `values`, which a kind appends in `update` and sums up in `compute`."""

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def rows(self) -> Tensor:  # -> (n,K) float64 on the host
        """All values so far, of all processes."""
        return dim_zero_cat(self.values).cpu().double()

    def score(self, evaluation: Evaluation) -> dict[str, float]:
        """Of the validation pictures: reconstruction/psnr and so on."""
        if "val" not in evaluation.splits:
            return {}
        self.reset()
        for batch in evaluation.mine("val"):
            self.update(evaluation.reconstruct(batch), batch)
        return {f"reconstruction/{k}": v for k, v in self.compute().items()}


class Reconstruction(OfReconstructions):
    """PSNR in dB and SSIM, each the mean over pictures (B, 3, H, W) in [-1, 1], with its standard error."""

    scores = tuple(f"reconstruction/{k}" for k in ("psnr", "psnr/se", "ssim", "ssim/se", "n"))  # of task=evaluate

    def update(self, images: Tensor, target: Tensor) -> None:
        """Reconstructions and what they should be; both are measured as pixels in [0, 1]."""
        images, target = (((x.float() + 1) / 2).clamp(0, 1) for x in (images, target))
        self.values.append(torch.stack([psnr(images, target), ssim(images, target)], dim=1))

    def compute(self) -> dict[str, float]:
        """{psnr, psnr/se, ssim, ssim/se, n}."""
        values = self.rows()  # (n, 2)
        n = len(values)
        mean = values.mean(dim=0).tolist()
        error = (values.std(dim=0) / math.sqrt(n)).tolist() if n > 1 else [math.nan, math.nan]
        return {"psnr": mean[0], "psnr/se": error[0], "ssim": mean[1], "ssim/se": error[1], "n": float(n)}


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) dB, at most `PSNR_MAX`."""
    error = (images - target).square().flatten(1).mean(dim=1)
    return -10 * error.clamp_min(10 ** (-PSNR_MAX / 10)).log10()


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) structural similarity (Wang et al. 2004: Gaussian window of 11 pixels)."""
    value = structural_similarity_index_measure(images, target, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(images))
