"""config.json of diffusers' autoencoders, of either kind that is read: AutoencoderKL and AutoencoderDC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError
from ldm.formats import fold
from ldm.formats.content import Node
from ldm.formats.diffusers.config import vae_node
from ldm.formats.files.bounded import LEVELS
from ldm.formats.match import DC
from ldm.formats.published import SCALING
from ldm.untrusted import shown

Settings = Mapping[str, Any]
DEEP = "AutoencoderDC"
_ALWAYS = {
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "quantization_config": None,
}
_WIDTHS = [128, 256, 512, 512, 1024, 1024]  # these and all other defaults are diffusers'
_SCALES = [[], [], [], [5], [5], [5]]
_NORMS = {("rms_norm", "silu"): "rms", ("batch_norm", "relu"): "batch"}


def is_deep(config: Settings) -> bool:
    """Whether it describes a deep compression autoencoder."""
    return config.get("_class_name") == DEEP


def autoencoder_node(config: Settings, where: str) -> Node:
    """An autoencoder's settings as ours. ConfigError names the first that ours has not."""
    return _deep_node(config, where) if is_deep(config) else vae_node(config, where)


def scaling(config: Settings, where: str) -> float:
    """The scaling factor of its latents, its class's default where it says none."""
    return fold.checked(config.get("scaling_factor", 1.0 if is_deep(config) else SCALING), where)


def _deep_node(config: Settings, where: str) -> Node:
    for key, value in _ALWAYS.items():
        if config.get(key, value) != value:
            raise _other(where, key, str(value), config[key])
    widths = _both(config, "block_out_channels", _WIDTHS, where)
    levels = len(widths)
    types = [_each(config, f"{half}_block_types", "ResBlock", levels, where) for half in ("encoder", "decoder")]
    flags = [name == "EfficientViTBlock" for name in types[0]]
    if types[0] != types[1] or any(name not in ("ResBlock", "EfficientViTBlock") for name in types[0]):
        raise _other(where, "decoder_block_types", "ResBlock and EfficientViTBlock, as in the encoder", types[1])
    scales = [
        sizes
        for half in ("encoder", "decoder")
        for sizes, flag in zip(_list(config, f"{half}_qkv_multiscales", _SCALES, levels, where), flags, strict=True)
        if flag
    ]
    if any(sizes != scales[0] for sizes in scales):
        raise _other(where, "decoder_qkv_multiscales", "the same at all levels of EfficientViTBlock", scales)
    node = {
        "_target_": DC,
        "in_channels": config.get("in_channels", 3),
        "latent_channels": config.get("latent_channels", 32),
        "block_channels": widths,
        "encoder_layers": _list(config, "encoder_layers_per_block", [2, 2, 2, 3, 3, 3], levels, where),
        "decoder_layers": _list(config, "decoder_layers_per_block", [3, 3, 3, 3, 3, 3], levels, where),
        "attention_levels": flags,
        "head_dim": config.get("attention_head_dim", 32),
        "kernel_sizes": (scales[0] or None) if scales else None,
        "decoder_norm": _norm(config, flags, where),
    }
    for ours, theirs, usual, choices in (
        ("downsample", "downsample_block_type", "pixel_unshuffle", ("pixel_unshuffle", "conv")),
        ("upsample", "upsample_block_type", "pixel_shuffle", ("pixel_shuffle", "interpolate")),
    ):
        node[ours] = config.get(theirs, usual)
        if node[ours] not in choices:
            raise _other(where, theirs, " or ".join(choices), node[ours])
    return node


def _norm(config: Settings, flags: list[bool], where: str) -> str:
    """The one norm, with its activation, of the decoder's residual blocks; those of attention are always RMS."""
    norms = _each(config, "decoder_norm_types", "rms_norm", len(flags), where)
    activations = _each(config, "decoder_act_fns", "silu", len(flags), where)
    found = {(norm, act) for norm, act, flag in zip(norms, activations, flags, strict=True) if not flag}
    attending = {norm for norm, flag in zip(norms, flags, strict=True) if flag}
    if len(found) > 1 or not found <= set(_NORMS) or not attending <= {"rms_norm"}:
        wanted = "rms_norm with silu, or batch_norm with relu at all levels of ResBlock"
        raise _other(where, "decoder_norm_types, decoder_act_fns", wanted, [norms, activations])
    return _NORMS[found.pop()] if found else "rms"


def _both(config: Settings, key: str, usual: list[Any], where: str) -> list[Any]:
    """A list that encoder and decoder share."""
    encoder, decoder = (config.get(f"{half}_{key}", usual) for half in ("encoder", "decoder"))
    if not isinstance(encoder, list) or not 1 <= len(encoder) <= LEVELS or encoder != decoder:
        raise _other(where, f"decoder_{key}", "one list of 1 to 16, as in the encoder", decoder)
    return encoder


def _list(config: Settings, key: str, usual: list[Any], levels: int, where: str) -> list[Any]:
    found = config.get(key, usual)
    if not isinstance(found, list) or len(found) != levels:
        raise _other(where, key, f"a list of {levels}, one a level", found)
    return found


def _each(config: Settings, key: str, usual: str, levels: int, where: str) -> list[Any]:
    """One word a level, of a list or of one word for all."""
    found = config.get(key, usual)
    return [found] * levels if isinstance(found, str) else _list(config, key, [], levels, where)


def _other(where: str, key: str, ours: str, theirs: Any) -> ConfigError:
    return ConfigError(
        f"{where} says {key}={shown(theirs)}, which ldm's deep compression autoencoder does not have (it has {ours}). "
        "Published ones of 2024 (dc-ae-f32c32-sana-1.0, and -in-1.0 and -mix-1.0 of all factors) are read."
    )
