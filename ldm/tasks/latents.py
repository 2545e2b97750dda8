"""task=latents: how good a latent space is, before a second stage is trained on it; one, or several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Batches, Checkpoint, ImageSize, Output, Seeded, Shards, Task, key


@dataclass
class Latents(Checkpoint, Shards, ImageSize, Batches, Seeded, Output, Task):
    checkpoint: str | None = key(
        None, "autoencoder, or [A,B,...]: run, checkpoint folder, diffusers folder, .safetensors, .ckpt", holds="path"
    )
    denoiser_steps: int = key(300, "steps of the small denoiser that is trained on the latents", least=1)
    denoiser_images: int = key(8192, "training pictures whose latents are measured and denoised, at most", least=2)

    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes latents.csv, latents.json and pictures of checkpoint=RUN, or of [A,B,C] together, into output=DIR."""
        from ldm.tasks.work.latents import compare

        return compare(config)
