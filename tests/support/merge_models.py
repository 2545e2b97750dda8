"""Small models and LoRAs of random weights, in every layout, for the tests of merging."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from format_checks import conf

from ldm.adapters.content import Lora, LowRank
from ldm.checkpoints.components import Components, build_components
from ldm.checkpoints.load import open_any
from ldm.checkpoints.save import save_any
from ldm.text.tokenizer import build_tokenizer

NAMES = {"ldm": "ours", "diffusers": "folder", "compvis": "one.safetensors"}
CAPTIONS = ["a photo of a red cat on a green chair", "the small blue house by the sea"]
PARTS = ("unet", "text_encoder")


def nodes(**changes: Mapping[str, Any]) -> dict[str, Any]:
    """The nodes of a small model; changes: key -> settings of its node."""
    text = conf("text_encoder", "small_tiny") | {"vocab_size": 560, "max_length": 16}
    found = {
        "model": conf("model", "unet_tiny"),
        "autoencoder": conf("autoencoder", "kl_tiny"),
        "text_encoder": text,
        "scheduler": conf("scheduler", "scaled_linear"),
        "parameterization": conf("parameterization", "eps"),
    }
    for key, settings in changes.items():
        found[key] = found[key] | settings
    return {"image_size": 32, **found}


def model(seed: int, captions: list[str] = CAPTIONS, **changes: Mapping[str, Any]) -> Components:
    """Random in every tensor. The autoencoder is the same for all seeds, in Stable Diffusion's units."""
    config = nodes(**changes)
    parts = build_components(config)
    parts.text_encoder.set_tokenizer(build_tokenizer(captions, 560))
    generator = torch.Generator()
    for part, module in parts.modules().items():
        generator.manual_seed(seed if part in PARTS else 0)
        for parameter in module.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    latents = parts.autoencoder.latents
    latents.mean.zero_()
    latents.scale.fill_(1 / 0.18215)
    parts.folder = Path(f"model-{seed}")
    return parts


@cache
def saved(folder: Path, seed: int, format: str) -> Path:
    """The model of a seed in a layout; written once."""
    path = folder / f"{seed}-{NAMES[format]}"
    save_any(model(seed), path, format)
    return path


@cache
def states(path: Path, weights: str = "ema") -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, whatever its layout, in our names. Never write in them."""
    found = open_any(path, weights).states
    return {part: {k: v.float() for k, v in state.items()} for part, state in found.items()}


@cache
def maps(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of the linear maps and convolutions of the network and the text encoder, by layer."""
    found = {}
    for part, module in model(seed).modules().items():
        if part in PARTS:
            for path, layer in module.named_modules():
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                    found[f"{part}.{path}"] = layer.weight.detach()
    return found


def lora(seed: int, rank: int, alpha: float | None = None, every: int = 1) -> Lora:
    """Random updates of every n-th map, convolutions of 3x3 and 1x1 among them."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, weight in list(maps().items())[::every]:
        out, ones = len(weight), (1,) * (weight.ndim - 2)
        down = 0.1 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.1 * torch.randn(out, rank, *ones, generator=generator)
        layers[name] = LowRank(down, up, float(rank) if alpha is None else alpha)
    return Lora(layers)
