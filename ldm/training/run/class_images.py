"""Class pictures that a run trains on beside its few own ones, against forgetting the class (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.folder import read_manifest
from ldm.data.samples import sequential
from ldm.data.shards.splits import open_split
from ldm.errors import ConfigError
from ldm.training.randomness import seed_of


class ClassImages:
    """What the base model draws of the class, as latents' moments in memory, each with its caption.

    The term `PriorPreservation` (ldm/training/losses/denoising.py) is their loss.
    """

    def __init__(self, moments: Tensor, captions: Sequence[str], fingerprint: str = ""):  # (N,MC,h,w)
        if len(moments) == 0:
            raise ConfigError("there is no class picture: give num_class_images=100, or class_images=DIR with some.")
        self.moments, self.captions, self.fingerprint = moments, captions, fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its part in a run's result."""
        return {"fingerprint": self.fingerprint, "captions": sorted(set(self.captions))}

    def drawn(self, seed: int, step: int, positions: Sequence[int]) -> tuple[Tensor, list[str]]:  # (B,MC,h,w)
        """One picture a position of the global batch, a function of (seed, step, position) like all draws."""
        chosen = [seed_of(seed, "prior", step, p) % len(self.moments) for p in positions]
        return self.moments[chosen], [self.captions[i] for i in chosen]


def read_class_images(config: Mapping[str, Any], autoencoder: Path | None) -> ClassImages | None:
    """The first num_class_images of class_shards= in memory; None without them. Without a caption: class_prompt=.

    autoencoder: the checkpoint folder whose autoencoder the run speaks. ConfigError where the latents are another's.
    """
    path, prompt = config.get("class_shards"), config.get("class_prompt")
    if not path:
        return None
    if not prompt:
        raise ConfigError(f'class_shards={path} are pictures of a class: say which, class_prompt="a photo of a dog".')
    shards = open_split(path, "train", 0.0)
    if shards.kind != "latent":
        raise ConfigError(f"class_shards={path} holds images: encode them, task=encode shards={path} checkpoint=BASE.")
    maker, size = shards.facts.get("autoencoder"), shards.facts.get("image_size")
    ours = read_manifest(autoencoder)["files"]["vae.safetensors"]["sha256"] if autoencoder is not None else maker
    if maker != ours or size != config["image_size"]:
        raise ConfigError(
            f"class_shards={path} holds latents of another autoencoder, or of {size} pixels where the run has "
            f"{config['image_size']}: leave class_shards= out (experiment=dreambooth makes them), or encode them again."
        )
    shards = shards.take(np.arange(min(len(shards), config["num_class_images"])), f"first {config['num_class_images']}")
    batches = [batch for batch, _ in sequential(shards, size, 64, fields=shards.reading.optional()) if batch]
    moments = torch.cat([b["latent"] for b in batches]) if batches else torch.empty(0)
    captions = [caption or prompt for b in batches for caption in b["caption"]]
    return ClassImages(moments, captions, shards.fingerprint)
