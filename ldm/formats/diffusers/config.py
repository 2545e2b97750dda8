"""Our nodes and the config.json of diffusers' and transformers' parts: the same settings in two vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError
from ldm.formats.content import Node
from ldm.formats.files.bounded import LEVELS
from ldm.formats.match import AUTOENCODER, TEXT, UNET
from ldm.untrusted import number, shown, whole

Settings = Mapping[str, Any]
# What our classes always do, in diffusers' words: anything else is another architecture.
_UNET_ALWAYS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_VAE_ALWAYS: dict[str, Any] = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
_TEXT_ALWAYS: dict[str, Any] = {"is_causal": True}  # transformers' switch for any of its models
_ALWAYS: dict[str, Any] = {"quantization_config": None}  # of any part: numbers that stand for others
# What a config.json of transformers' CLIPTextModel leaves unsaid; some of the first files say a part of it twice.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MIDDLES = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}


def unet_node(config: Settings, where: str) -> Node:
    """UNet2DConditionModel's settings as ours. ConfigError names the first that our U-Net has not."""
    _check(config, _UNET_ALWAYS, where)
    attends = _flags(config, "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", where)
    ups = _flags(config, "up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", where)
    widths = _widths(config, attends, where)
    middle = f"{config.get('mid_block_type', 'UNetMidBlock2DCrossAttn')}"
    if ups != attends[::-1] or middle not in _MIDDLES:
        raise _other(where, "up_block_types" if middle in _MIDDLES else "mid_block_type", "a mirror of the way down")
    return {
        "_target_": UNET,
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "block_channels": widths,
        "layers_per_block": _one(config.get("layers_per_block", 2), "layers_per_block", where),
        "attention_levels": attends,
        "mid_attention": _MIDDLES[middle],
        "cross_attention_dim": _one(config.get("cross_attention_dim", 1280), "cross_attention_dim", where),
        **_heads(config, widths, where),
        "transformer_depth": _one(config.get("transformer_layers_per_block", 1), "transformer_layers_per_block", where),
        "linear_projection": config.get("use_linear_projection", False),
        "norm_groups": config.get("norm_num_groups", 32),
    }


def unet_config(node: Settings, sample_size: int) -> dict[str, Any]:
    """UNet2DConditionModel's config.json; node: every argument of ours, sample_size: latent pixels a side."""
    widths, flags = list(node["block_channels"]), list(node["attention_levels"])
    heads = node["num_heads"] or [max(1, width // node["head_dim"]) for width in widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": node["in_channels"],
        "out_channels": node["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": node["layers_per_block"],
        "down_block_types": ["CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in flags],
        "up_block_types": ["CrossAttnUpBlock2D" if flag else "UpBlock2D" for flag in flags[::-1]],
        "mid_block_type": {v: k for k, v in _MIDDLES.items()}[node["mid_attention"]],
        "cross_attention_dim": node["cross_attention_dim"],
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "transformer_layers_per_block": node["transformer_depth"],
        "use_linear_projection": node["linear_projection"],
        "norm_num_groups": node["norm_groups"],
        **_UNET_ALWAYS,
    }


def vae_node(config: Settings, where: str) -> Node:
    """AutoencoderKL's settings as ours. ConfigError names the first that our autoencoder has not."""
    _check(config, _VAE_ALWAYS, where)
    attends = _flags(config, "down_block_types", "DownEncoderBlock2D", "AttnDownEncoderBlock2D", where)
    ups = _flags(config, "up_block_types", "UpDecoderBlock2D", "AttnUpDecoderBlock2D", where)
    if ups != attends[::-1]:
        raise _other(where, "up_block_types", "a mirror of the way down")
    node = {
        "_target_": AUTOENCODER,
        "in_channels": config.get("in_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "block_channels": _widths(config, attends, where),
        "layers_per_block": config.get("layers_per_block", 1),
        "norm_groups": config.get("norm_num_groups", 32),
        "mid_attention": config.get("mid_block_add_attention", True),
    }
    return node | ({"attention_levels": attends} if any(attends) else {})


def vae_config(node: Settings, scaling: float, sample_size: int) -> dict[str, Any]:
    """AutoencoderKL's config.json; node: every argument of ours, sample_size: image pixels a side."""
    widths = list(node["block_channels"])
    flags = list(node.get("attention_levels") or [False] * len(widths))
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": node["in_channels"],
        "out_channels": node["in_channels"],
        "latent_channels": node["latent_channels"],
        "block_out_channels": widths,
        "layers_per_block": node["layers_per_block"],
        "down_block_types": ["AttnDownEncoderBlock2D" if flag else "DownEncoderBlock2D" for flag in flags],
        "up_block_types": ["AttnUpDecoderBlock2D" if flag else "UpDecoderBlock2D" for flag in flags[::-1]],
        "norm_num_groups": node["norm_groups"],
        "mid_block_add_attention": node["mid_attention"],
        "scaling_factor": scaling,
        **_VAE_ALWAYS,
    }


def text_node(config: Settings, where: str) -> Node:
    """CLIPTextModel's settings as ours, or the text half of a whole CLIP's. What our encoder always has is left out."""
    _check(config, {}, where)
    twice = config.get("text_config_dict")
    config = config.get("text_config") or config
    for key, said in (("text_config", config), ("text_config_dict", twice)):
        if not isinstance(said, dict | None):
            raise ConfigError(f"{where} says {key}={shown(said)}: settings belong there. Fetch it again.")
    said = _TEXT_DEFAULTS | dict(config) | ({} if twice is None else _TEXT_DEFAULTS | twice)  # as transformers reads it
    _check(said, _TEXT_ALWAYS, where)
    if isinstance(said["eos_token_id"], list):
        raise _other(where, "eos_token_id", "one end mark", said["eos_token_id"])
    for key in ("layer_norm_eps", "attention_dropout"):
        number(said[key], key, where, 0.0, 1.0)
    width, inside = (whole(said[key], key, where) for key in ("hidden_size", "intermediate_size"))
    unusual = {
        "feed_forward": None if inside == 4 * width else inside,
        "norm_eps": None if said["layer_norm_eps"] == 1e-5 else said["layer_norm_eps"],
        "attention_dropout": said["attention_dropout"] or None,
        "projection_dim": None if said["projection_dim"] == width else said["projection_dim"],
    }
    return {
        "_target_": TEXT,
        "vocab_size": said["vocab_size"],
        "max_length": said["max_position_embeddings"],
        "width": width,
        "layers": said["num_hidden_layers"],
        "heads": said["num_attention_heads"],
        "activation": said["hidden_act"],
        "pad": None,  # the tokenizer beside it knows
        "marks": [said[name] for name in MARKS],
        **{name: value for name, value in unusual.items() if value is not None},
    }


def text_config(node: Settings, marks: Mapping[str, int | None]) -> dict[str, Any]:
    """CLIPTextModel's config.json; node: every argument of ours, marks: the tokenizer's, where the node has none."""
    if node["marks"] is not None:
        own = dict(zip(MARKS, node["marks"], strict=True))
        marks = own if node["pad"] is None else own | {"pad_token_id": marks["pad_token_id"]}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": node["vocab_size"],
        "max_position_embeddings": node["max_length"],
        "hidden_size": node["width"],
        "intermediate_size": 4 * node["width"] if node["feed_forward"] is None else node["feed_forward"],
        "projection_dim": node["width"] if node["projection_dim"] is None else node["projection_dim"],
        "num_hidden_layers": node["layers"],
        "num_attention_heads": node["heads"],
        "hidden_act": node["activation"],
        "layer_norm_eps": node["norm_eps"],
        "attention_dropout": node["attention_dropout"],
        **marks,
    }


def _heads(config: Settings, widths: list[int], where: str) -> dict[str, int | None]:
    """One number of heads, or one width of them, at all levels."""
    key = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"  # counts heads, too
    given = config.get(key, 8)
    counts = [whole(n, key, where) for n in (given if isinstance(given, list) else [given] * len(widths))]
    if len(counts) != len(widths):
        raise _other(where, key, "one number of heads a level", given)
    dims = {width / n for width, n in zip(widths, counts, strict=True)}
    if len(set(counts)) == 1:
        return {"head_dim": None, "num_heads": counts[0]}
    if len(dims) == 1:
        return {"head_dim": int(dims.pop()), "num_heads": None}
    raise _other(where, "attention_head_dim", "one number of heads, or heads of one width, at all levels")


def _widths(config: Settings, levels: list[bool], where: str) -> list[int]:
    found = config.get("block_out_channels")
    if not isinstance(found, list) or len(found) != len(levels):
        raise ConfigError(
            f"{where} says block_out_channels={shown(found)}: a width for each of {len(levels)} levels belongs there. "
            "Fetch it again."
        )
    return [whole(width, "block_out_channels", where) for width in found]


def _flags(config: Settings, key: str, plain: str, attending: str, where: str) -> list[bool]:
    found = config.get(key)
    known = isinstance(found, list) and all(block in (plain, attending) for block in found)
    if not isinstance(found, list) or not known or not 1 <= len(found) <= LEVELS:
        raise _other(where, key, f"{plain} and {attending}")
    return [block == attending for block in found]


def _one(value: Any, key: str, where: str) -> int | None:
    values = value if isinstance(value, list) and value else [value]
    if any(one != values[0] for one in values):
        raise _other(where, key, "one value for all levels")
    return None if values[0] is None else whole(values[0], key, where)


def _check(config: Settings, always: Settings, where: str) -> None:
    for key, value in {**_ALWAYS, **always}.items():
        if config.get(key, value) != value:
            raise _other(where, key, str(value), config[key])


def _other(where: str, key: str, ours: str, theirs: Any = None) -> ConfigError:
    said = key if theirs is None else f"{key}={shown(theirs)}"
    return ConfigError(
        f"{where} says {said}, which ldm's models do not have (they have {ours}): it is of another architecture. "
        "Stable Diffusion 1 and 2, and models of their structure in other sizes, are read."
    )
