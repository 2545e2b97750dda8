"""Published weights of the frozen parts: from a folder, a single file or a hub id (its cache, or the hub itself)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.autoencoders.dc import AutoencoderDC
from ldm.autoencoders.kl import Autoencoder
from ldm.checkpoints.components import Components, load_state
from ldm.errors import ConfigError
from ldm.formats import fold
from ldm.formats.checkpoint import read
from ldm.formats.diffusers.autoencoder import DEEP, autoencoder_node, is_deep, scaling
from ldm.formats.diffusers.config import text_node
from ldm.formats.diffusers.folder import load_part, weights_file
from ldm.formats.files import hub
from ldm.formats.files.open import float32
from ldm.formats.keys import text as text_keys
from ldm.formats.keys import vae as vae_keys
from ldm.text.clip import CLIPText
from ldm.text.encoder import TextEncoder
from ldm.untrusted import interpreted, read_json, shown

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TEXT_FILES = ("model.safetensors", "vocab.json", "merges.txt", "config.json")


def load_pretrained(parts: Components, filled: set[str]) -> None:
    """Fills the parts that name `pretrained` weights, except those that a checkpoint has `filled` ("vae", ...)."""
    autoencoder, text_encoder = parts.autoencoder, parts.text_encoder
    with interpreted("what pretrained= names"):
        _load(autoencoder, text_encoder, filled)


def _load(autoencoder: Autoencoder, text_encoder: TextEncoder | None, filled: set[str]) -> None:
    if autoencoder.pretrained and "vae" not in filled:
        load_autoencoder(autoencoder, autoencoder.pretrained)
    if isinstance(text_encoder, CLIPText) and text_encoder.pretrained and "text_encoder" not in filled:
        load_text_encoder(text_encoder, text_encoder.pretrained)


def check_pretrained(config: Mapping[str, Any], autoencoder: bool, text_encoder: bool) -> None:
    """One ConfigError naming all published weights, of what is needed, that cannot be had; before any data are read."""
    wanted = [("autoencoder", _autoencoder_folder)] if autoencoder else []
    if text_encoder:
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
    """Weights and scaling factor of a diffusers autoencoder folder, of a whole pipeline's, or of a single file."""
    own, source = autoencoder.state_dict(), Path(name)
    if source.is_file():
        state = read(source).states.get("vae", {})
    else:
        source = _autoencoder_folder(name)
        config = read_json(source / "config.json")
        _check_same_kind(autoencoder, config, name)
        units = fold.units(own, scaling(config, f"{source / 'config.json'}"), config.get("shift_factor"))
        state = vae_keys.from_diffusers(load_part(source, "vae")) | units
    load_state(autoencoder, {k: float32(v) for k, v in state.items()}, "diffusion_pytorch_model", source)


def _check_same_kind(autoencoder: Autoencoder, config: Mapping[str, Any], name: str) -> None:
    """ConfigError where the weights are of the other kind, or of one that computes something else with these shapes."""
    if is_deep(config) != isinstance(autoencoder, AutoencoderDC):
        theirs, option = (DEEP, "dc_f32") if is_deep(config) else (config.get("_class_name"), "kl_f8")
        raise ConfigError(
            f"autoencoder.pretrained={name} is an {shown(theirs)}, not an {type(autoencoder).__name__}: choose "
            f"autoencoder={option} for it, or other weights."
        )
    if isinstance(autoencoder, AutoencoderDC):
        said = autoencoder_node(config, f"{name}'s config.json")
        for key in ("head_dim", "decoder_norm"):
            if getattr(autoencoder, key) != said[key]:
                raise ConfigError(
                    f"autoencoder.{key}={getattr(autoencoder, key)}, but autoencoder.pretrained={name} says "
                    f"{said[key]}: set autoencoder.{key}={said[key]}."
                )


def load_text_encoder(encoder: CLIPText, name: str) -> None:
    """Weights of transformers' CLIP text model or of its half of a whole CLIP; layers beyond ours are left out."""
    folder = _text_encoder_folder(name)
    _check_same_function(encoder, folder / "config.json", name)
    layers = len(encoder.text_model.encoder.layers)
    state = text_keys.from_transformers(load_part(folder, "text_encoder"), layers)
    load_state(encoder, {k: float32(v) for k, v in state.items()}, "model", folder)
    if not encoder.has_tokenizer:
        beside = [folder, folder.parent / "tokenizer"]  # the latter in a whole pipeline's folder
        encoder.load_tokenizer(next((f for f in beside if (f / TEXT_FILES[1]).is_file()), folder))


# What the tensors' shapes do not say: our argument -> transformers' setting.
_UNSEEN = {"heads": "num_attention_heads", "activation": "hidden_act", "norm_eps": "layer_norm_eps"}


def _check_same_function(encoder: CLIPText, file: Path, name: str) -> None:
    """ConfigError where the weights are of an encoder that computes something else with the same shapes."""
    if not file.is_file():
        return
    said = {"norm_eps": 1e-5} | text_node(read_json(file), str(file))
    for ours, theirs in _UNSEEN.items():
        mine = getattr(encoder.text_model.config, theirs)
        if mine != said[ours]:
            raise ConfigError(
                f"text_encoder.{ours}={mine}, but text_encoder.pretrained={name} says {theirs}={said[ours]}: set "
                f"{'+' if ours == 'norm_eps' else ''}text_encoder.{ours}={said[ours]}."
            )


def _autoencoder_folder(name: str) -> Path:
    return Path(name) if Path(name).is_file() else _find(name, "autoencoder", VAE_FILES, "vae", needed=VAE_FILES)


def _text_encoder_folder(name: str) -> Path:
    return _find(name, "text_encoder", TEXT_FILES, "text_encoder", needed=TEXT_FILES[:1])


def _find(name: str, node: str, files: tuple[str, ...], part: str, needed: tuple[str, ...]) -> Path:
    """The folder with a part's weights: `name` itself, its subfolder `part`, or the hub's `name`. Else ConfigError."""
    key = f"{node}.pretrained"
    remedy = f"Give a folder with {' and '.join(needed)}: {key}=DIR"
    patterns = [*files, *(f"{part}/{f}" for f in files), "tokenizer/*"]
    root = Path(name) if Path(name).is_dir() else hub.fetch(name, key, patterns, remedy)
    for folder in (root, root / part):
        if weights_file(folder, part) and (part != "vae" or (folder / "config.json").is_file()):
            return folder
    raise ConfigError(f"{key}={name} does not hold {' and '.join(needed)}. {remedy}.")
