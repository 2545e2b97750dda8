"""task=encode: shards of images into shards of latents, so that training never runs the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Batches, Checkpoint, ImageSize, Output, Shards, Task


@dataclass
class Encode(Shards, Checkpoint, ImageSize, Batches, Output, Task):
    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes output=DIR from shards=PATH with the autoencoder of checkpoint=RUN."""
        from ldm.tasks.work.encode import encode

        return encode(config)
