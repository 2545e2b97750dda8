"""A configuration's module and the parts of its training step on the meta device, for whoever counts what they take."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.components import attach_adapters
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.text.encoder import CLIPTokenized
from ldm.text.tokenizer import build_tokenizer
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainedModule
from ldm.training.run.build import build_module, build_parts
from ldm.training.run.frozen import DTYPES, cast_frozen, check_frozen_dtype

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Simulated:
    """module: what a resolved configuration trains, without numbers. half: the type that autocast uses, None: none.

    ConfigError for configurations of which nothing can be said. Left out of the step: loss terms beside the module's
    own of module=latent_diffusion, and class pictures.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config, self.half = config, checked(config)
        module = fresh_module(config, "meta")
        if isinstance(module, AutoencoderTraining):
            for term in module.terms.values():
                term.begins = 0  # what a step takes once all of them have begun
        assert isinstance(module, LatentDiffusion | AutoencoderTraining)
        self.module = module
        self._check_size()

    @property
    def diffusion(self) -> LatentDiffusion | None:
        """The module, where it is that of latent diffusion."""
        return self.module if isinstance(self.module, LatentDiffusion) else None

    @property
    def encodes(self) -> bool:
        """Whether a step of latent diffusion runs the autoencoder: not where latents are made beforehand."""
        return self.diffusion is not None and not reads_latents(self.config, self.diffusion)

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:  # (B,C,h,w)
        side = self.config["image_size"] // self.module.autoencoder.factor
        return batch, len(self.module.autoencoder.latents.mean), side, side

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:  # -> (B,3,H,W)
        size = self.config["image_size"]
        return torch.empty(self.config["batch_size"], 3, size, size, device="meta", dtype=dtype)

    def encode(self, images: Tensor) -> None:
        """The autoencoder's share of a step of latent diffusion: pictures to latents, masked ones too."""
        module = self.diffusion
        assert module is not None
        for _ in range(1 if module.masks is None else 2):
            module.autoencoder.encode(images)

    def condition(self) -> Condition:
        """The text encoder's share."""
        module, batch = self.diffusion, self.config["batch_size"]
        assert module is not None
        with torch.set_grad_enabled(module.text_has_gradient):
            ids = torch.zeros(batch, module.text_encoder.max_length, dtype=torch.long, device="meta")
            return module.text_encoder.states(ids)

    def denoising_loss(self, cond: Condition) -> Tensor:
        """The denoising network's share, (): its loss under conditions of a batch."""
        module, batch, noises = self.diffusion, self.config["batch_size"], self.config["noises_per_image"]
        assert module is not None
        x0 = torch.empty(self.latent_shape(batch), device="meta").repeat_interleave(noises, dim=0)
        concat = None
        if module.masks is not None:
            masks = torch.empty(batch, 1, *x0.shape[-2:], device="meta").repeat_interleave(noises, dim=0)
            concat = torch.cat([masks, torch.empty_like(x0)], dim=1)
        given = replace(cond.repeat_interleave(noises), concat=concat)
        prediction = module.predict(x0, given, torch.full((len(x0),), 0.5), torch.empty_like(x0))
        return prediction.loss(module.weighting).mean()

    def autoencoder_loss(self, images: Tensor) -> Tensor:  # (B,3,H,W) uint8 -> ()
        """All of an autoencoder's step but its backward pass."""
        assert isinstance(self.module, AutoencoderTraining)
        return self.module.training_step({"image": images}, 0)

    def _check_size(self) -> None:
        size, factor = self.config["image_size"], self.module.autoencoder.factor
        if size % factor:
            raise ConfigError(
                f"image_size={size} does not divide by the autoencoder's factor {factor}: give "
                f"{size // factor * factor} or {(size // factor + 1) * factor}."
            )


def fresh_module(config: Mapping[str, Any], device: str) -> TrainedModule:
    """What a configuration trains, with fresh weights, frozen ones in their type, and with some words for its text."""
    parts = build_parts(config, device)
    if parts.text_encoder is not None:
        cast_frozen(parts, bool(config.get("adapter")), DTYPES[config["frozen_dtype"]])
        words = parts.text_encoder
        if isinstance(words, CLIPTokenized) and not words.has_tokenizer:  # which words it knows changes no size
            words.set_tokenizer(build_tokenizer(["a photo"], words.vocab_size))
        attach_adapters(config, parts, {"unet": dict(parts.network.state_dict())})
    # Loss terms of an autoencoder bring networks; of denoising, levels are numbers on the host.
    with torch.device(device) if parts.denoiser is None else nullcontext():
        return build_module(config, parts)


def reads_latents(config: Mapping[str, Any], module: LatentDiffusion) -> bool:
    """Whether it trains on latents that were made beforehand; masking needs the pictures."""
    return (config["stages"] or {}).get("encode", False) is not False and module.masks is None


def checked(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type that autocast uses; ConfigError for configurations that no plan can be made of."""
    check_frozen_dtype(config)
    precision = str(config["trainer"].get("precision", "32-true"))
    if precision not in AUTOCAST:
        raise ConfigError(f"task=plan does not know trainer.precision={precision}: choose {', '.join(AUTOCAST)}.")
    if config["image_size"] is None:
        raise ConfigError("task=plan reads no data, so it needs the size of the pictures: give image_size=512.")
    return AUTOCAST[precision]
