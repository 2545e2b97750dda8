"""Trains the first stage: images -> latents -> images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders.kl import Autoencoder
from ldm.devices import beside
from ldm.pictures import to_unit
from ldm.training.distributed import collectives
from ldm.training.ema import EMA
from ldm.training.losses.reconstruction import Reconstruction
from ldm.training.losses.term import PictureTerm
from ldm.training.module import LearningRate, OptimizerMaker, TrainedModule
from ldm.training.randomness import seed_of


class AutoencoderTraining(TrainedModule):
    """Reconstruction plus what the autoencoder says against wild latents, a small KL term or a codebook's terms
    (Rombach et al. 2022, Appendix G).

    losses: terms by name, on the pictures that come back; perceptual and adversarial ones belong here too.
    kl_weight: per nat of an image, beside the mean over its pixels and channels.
    optimizer, lr_scheduler, ema, seed: as in `TrainedModule`.
    """

    kind = "autoencoder"
    parts = {"vae": "autoencoder"}  # noqa: RUF012 (a constant of the class)

    def __init__(
        self,
        autoencoder: Autoencoder,
        optimizer: OptimizerMaker,
        losses: Mapping[str, PictureTerm | None] | None = None,
        kl_weight: float = 1e-6,
        lr_scheduler: LearningRate | None = None,
        ema: EMA | None = None,
        seed: int = 0,
    ):
        super().__init__(optimizer, lr_scheduler, ema, seed)
        self.autoencoder = autoencoder
        self.take_losses(losses or {"reconstruction": Reconstruction()})
        self.kl_weight = kl_weight
        self.count([f"train/{n}" for n in ("loss", *self.losses, *autoencoder.regulariser_names)])

    @property
    def trained_parts(self) -> list[str]:
        return ["vae", *self.loss_parts]

    def _losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """(B,) values of every term."""
        return {name: term(output.float(), images) for name, term in self.losses.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        positions = self.draws.positions(batch_idx, len(images))
        eps = self.draws.normal(posterior.mean.shape[1:], "posterior", self.global_step, positions)
        values = self._losses(self.autoencoder.decode(posterior.sample(beside(eps, images))), images)
        self.autoencoder.begin_batch(positions, self.draws.global_batch)
        regulariser, watched = self.autoencoder.regulariser(posterior, self.kl_weight)
        loss = self.weighed(values) + regulariser
        for name, value in {"loss": loss, **values, **watched}.items():
            self.totals.add(f"train/{name}", value)
        return loss.mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        seed = seed_of(self.draws.seed, "autoencoder")
        self.autoencoder.end_step(collectives.total_on_device, seed, self.global_step)

    def validation_names(self) -> list[str]:
        return ["val/loss", "val/psnr", *(f"val/{n}" for n in self.autoencoder.regulariser_names)]

    def validation_values(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        output = self.autoencoder.decode(posterior.mode()).float().clamp(-1, 1)
        regulariser, watched = self.autoencoder.regulariser(posterior, self.kl_weight)
        loss = self.weighed(self._losses(output, images)) + regulariser
        return {"val/loss": loss, "val/psnr": psnr(output, images), **{f"val/{n}": v for n, v in watched.items()}}


def psnr(output: Tensor, images: Tensor) -> Tensor:  # (B,3,H,W) in [-1, 1] x2 -> (B,) decibels
    """Peak signal-to-noise ratio of each image; the peak-to-peak range is 2."""
    mse = (output - images).square().flatten(1).mean(dim=1).clamp_min(1e-10)
    return 10 * torch.log10(4 / mse)
