"""Published weights of the frozen parts: from a folder or, by its id, from the hub's cache or the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file
from torch import Tensor

from ldm.autoencoders.kl import Autoencoder
from ldm.errors import ConfigError
from ldm.text.clip import CLIPText
from ldm.training.assemble import Parts, fill

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TEXT_FILES = ("model.safetensors", "vocab.json", "merges.txt")
# diffusers' first names of the attention's four maps.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load_pretrained(parts: Parts, filled: set[str]) -> None:
    """Fills the parts that name `pretrained` weights, except those that a checkpoint has `filled` ("vae", ...)."""
    autoencoder, text_encoder = parts.autoencoder, parts.text_encoder
    if autoencoder.pretrained and "vae" not in filled:
        load_autoencoder(autoencoder, autoencoder.pretrained)
    if isinstance(text_encoder, CLIPText) and text_encoder.pretrained and "text_encoder" not in filled:
        load_text_encoder(text_encoder, text_encoder.pretrained)


def check_pretrained(config: Mapping[str, Any], needs_autoencoder: bool) -> None:
    """One ConfigError naming all published weights that cannot be had, before any data are read."""
    wanted = [("autoencoder", _autoencoder_folder)] if needs_autoencoder else []
    if config["module"] == "latent_diffusion":
        wanted.append(("text_encoder", _text_encoder_folder))
    missing = []
    for node, folder_of in wanted:
        try:
            if config[node].get("pretrained"):
                folder_of(config[node]["pretrained"])
        except ConfigError as error:
            missing.append(str(error))
    if missing:
        raise ConfigError(" ".join(missing))


def load_autoencoder(autoencoder: Autoencoder, name: str) -> None:
    """Weights and scaling factor of a diffusers autoencoder folder, or of the `vae` folder of a whole pipeline."""
    folder = _autoencoder_folder(name)
    config = json.loads((folder / VAE_FILES[0]).read_text())
    state = {_renamed(k): v for k, v in load_file(folder / VAE_FILES[1]).items()}
    own = autoencoder.state_dict()
    for key, tensor in state.items():
        if key in own and tensor.ndim != own[key].ndim:  # 1x1 convolutions stored as linear maps, or the reverse
            state[key] = tensor.reshape(own[key].shape)
    latents = {k: v for k, v in own.items() if k.startswith("latents.")}
    fill(autoencoder, {**latents, **state}, "diffusion_pytorch_model", folder)
    autoencoder.latents.set(config.get("shift_factor") or 0.0, 1 / config.get("scaling_factor", 0.18215))


def load_text_encoder(encoder: CLIPText, name: str) -> None:
    """Weights of transformers' CLIP text model or of its half of a whole CLIP; layers beyond ours are left out."""
    folder = _text_encoder_folder(name)
    state = _text_half(load_file(folder / TEXT_FILES[0]), len(encoder.text_model.encoder.layers))
    fill(encoder, state, "model", folder)
    if not encoder.has_tokenizer:
        beside = [folder, folder.parent / "tokenizer"]  # the latter in a whole pipeline's folder
        encoder.load_tokenizer(next((f for f in beside if (f / TEXT_FILES[1]).is_file()), folder))


def _autoencoder_folder(name: str) -> Path:
    return find(name, "autoencoder.pretrained", VAE_FILES, "vae")


def _text_encoder_folder(name: str) -> Path:
    return find(name, "text_encoder.pretrained", TEXT_FILES, "text_encoder", optional=TEXT_FILES[1:])


def find(name: str, key: str, files: tuple[str, ...], part: str, optional: tuple[str, ...] = ()) -> Path:
    """The folder with these files: `name` itself, its subfolder `part`, or the hub's `name`. ConfigError if none is."""
    needed = [f for f in files if f not in optional]
    remedy = f"Give a folder with {' and '.join(needed)}: {key}=DIR"
    if Path(name).is_dir():
        root = Path(name)
    else:
        try:
            root = Path(
                snapshot_download(name, allow_patterns=[*files, *(f"{part}/{f}" for f in files), "tokenizer/*"])
            )
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigError(
                f"{key}={name} is not a folder here, and cannot be fetched from the hub ({type(error).__name__}). "
                f"{remedy}, or fetch it once where there is a network (hf download {name})."
            ) from error
    for folder in (root, root / part):
        if all((folder / f).is_file() for f in needed):
            return folder
    raise ConfigError(f"{key}={name} does not hold {' and '.join(needed)}. {remedy}.")


def _text_half(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The text model's tensors under `text_model.`, without the layers from `layers` on, and nothing else."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        inner = name.removeprefix("text_model.")
        if not inner.startswith(("embeddings.", "encoder.", "final_layer_norm.")) or "position_ids" in inner:
            continue  # the picture's half of CLIP, projections
        if inner.startswith("encoder.layers.") and int(inner.split(".")[2]) >= layers:
            continue
        found[name] = tensor.to(torch.float32)
    return found


def _renamed(key: str) -> str:
    for old, new in _OLD_NAMES.items():
        key = key.replace(old, new)
    return key
