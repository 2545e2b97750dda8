"""After the last step of an autoencoder: what a standardised latent is, and a linear picture of it."""

from __future__ import annotations

from typing import Any

import lightning as L

from ldm.pictures import to_unit
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.module import is_last_step, is_optimizer_step


class LatentStatistics(L.Callback):
    """Measures the latents' mean and scale per channel and fits the preview, before the final checkpoint is saved."""

    watches = AutoencoderTraining

    def __init__(self, num_images: int = 2048):
        self.num_images = num_images

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_optimizer_step(trainer, batch_idx) or not is_last_step(trainer):
            return
        assert isinstance(pl_module, AutoencoderTraining)
        autoencoder, batches = pl_module.autoencoder, trainer.datamodule.some_training_images(self.num_images)  # type: ignore[attr-defined]
        with pl_module.averaged():
            # The same images on every rank: the numbers are equal without a collective.
            images = [to_unit(batch.to(pl_module.device)) for batch in batches]
            posteriors = [autoencoder.encode(image) for image in images]
            if pl_module.trains_encoder or not autoencoder.latents.measured:  # or diffusion knows them by these units
                autoencoder.latents.measure(posteriors)
            pairs = zip((autoencoder.latents.standardise(p.mode()) for p in posteriors), images, strict=True)
            autoencoder.latents.fit_preview(pairs)
