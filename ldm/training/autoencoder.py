"""Trains the first stage: images -> latents -> images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders.kl import Autoencoder
from ldm.training.module import Recipe, TrainedModule
from ldm.training.randomness import Draws, normal
from ldm.training.totals import Totals


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


ERRORS = {
    "squared": lambda error: error.square(),
    "absolute": lambda error: error.abs(),
    "both": lambda error: error.abs() + error.square(),
}


class AutoencoderTraining(TrainedModule):
    """Reconstruction plus what the autoencoder says against wild latents, a small KL term or a codebook's terms
    (Rombach et al. 2022, Appendix G).

    reconstruction: squared error (best PSNR, and by far the best in few steps), absolute error (Stable Diffusion's, for
        use with perceptual terms) or both in equal parts. kl_weight is per nat of an image beside the mean over its
        pixels and channels.

    Perceptual and adversarial terms belong in `reconstruction_loss`.
    """

    parts = {"vae": "autoencoder"}  # noqa: RUF012 (a constant of the class)

    def __init__(
        self,
        autoencoder: Autoencoder,
        recipe: Recipe,
        draws: Draws,
        kl_weight: float = 1e-6,
        reconstruction: str = "squared",
    ):
        super().__init__(recipe, draws)
        self.error = ERRORS[reconstruction]
        self.autoencoder = autoencoder
        self.kl_weight = kl_weight
        self.totals = Totals([f"train/{n}" for n in ("loss", "reconstruction", *autoencoder.regulariser_names)])

    @property
    def trained_parts(self) -> list[str]:
        return ["vae"]

    def reconstruction_loss(self, output: Tensor, images: Tensor) -> Tensor:  # (B,3,H,W) x2 -> (B,)
        return self.error(output.float() - images).flatten(1).mean(dim=1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        positions = self.draws.positions(batch_idx, len(images))
        eps = normal(posterior.mean.shape[1:], self.draws.seed, "posterior", self.global_step, positions)
        output = self.autoencoder.decode(posterior.sample(eps.to(images)))
        reconstruction = self.reconstruction_loss(output, images)
        regulariser, watched = self.autoencoder.regulariser(posterior, self.kl_weight)
        loss = reconstruction + regulariser
        for name, values in {"loss": loss, "reconstruction": reconstruction, **watched}.items():
            self.totals.add(f"train/{name}", values)
        return loss.mean()

    def validation_names(self) -> list[str]:
        return ["val/loss", "val/psnr", *(f"val/{n}" for n in self.autoencoder.regulariser_names)]

    def validation_values(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        output = self.autoencoder.decode(posterior.mode()).float().clamp(-1, 1)
        regulariser, watched = self.autoencoder.regulariser(posterior, self.kl_weight)
        loss = self.reconstruction_loss(output, images) + regulariser
        return {"val/loss": loss, "val/psnr": psnr(output, images), **{f"val/{n}": v for n, v in watched.items()}}


def psnr(output: Tensor, images: Tensor) -> Tensor:  # (B,3,H,W) in [-1, 1] x2 -> (B,) decibels
    """Peak signal-to-noise ratio of each image; the peak-to-peak range is 2."""
    mse = (output - images).square().flatten(1).mean(dim=1).clamp_min(1e-10)
    return 10 * torch.log10(4 / mse)
