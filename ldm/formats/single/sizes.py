"""A part's node from the shapes of its tensors: all that shapes say, and nothing that they do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from ldm.errors import ConfigError
from ldm.formats.match import VQ


def unet(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a U-Net in CompVis' names, without the prefix. ConfigError where they are not a U-Net's."""
    _require(theirs, {"input_blocks.0.0.weight": 4, "out.2.weight": 4}, "U-Net")
    widths: list[int] = []
    attends: list[bool] = []
    layers = 0
    width, attending = None, False
    for i in count(1):
        resnet = theirs.get(f"input_blocks.{i}.0.in_layers.2.weight")
        if resnet is not None:
            width, attending = resnet.shape[0], f"input_blocks.{i}.1.norm.weight" in theirs
            layers += not widths
        elif width is not None:
            widths.append(width)
            attends.append(attending)
            width = None
            if f"input_blocks.{i}.0.op.weight" not in theirs:
                break
        else:
            break
    projection = _first(theirs, ".proj_in.weight")
    context = _first(theirs, ".attn2.to_k.weight")
    depths = _numbers(r".*\.transformer_blocks\.(\d{1,4})\..*", theirs)
    return {
        "in_channels": theirs["input_blocks.0.0.weight"].shape[1],
        "out_channels": theirs["out.2.weight"].shape[0],
        "block_channels": widths,
        "layers_per_block": layers,
        "attention_levels": attends,
        "mid_attention": "middle_block.1.norm.weight" in theirs,
        "cross_attention_dim": None if context is None else context.shape[1],
        "transformer_depth": 1 + max(depths, default=0),
        "linear_projection": projection is not None and projection.ndim == 2,
    }


def autoencoder(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a KL or VQ autoencoder in our names, whole. ConfigError where they are not one's."""
    _require(
        ours, {f"{name}.weight": 4 for name in ("encoder.conv_in", "post_quant_conv", "quant_conv")}, "autoencoder"
    )
    widths: list[int] = []
    attends: list[bool] = []
    for i in count():
        resnet = ours.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")
        if resnet is None:
            break
        widths.append(resnet.shape[0])
        attends.append(f"encoder.down_blocks.{i}.attentions.0.group_norm.weight" in ours)
    layers = len({k.split(".")[4] for k in ours if k.startswith("encoder.down_blocks.0.resnets.")})
    node: dict[str, Any] = {
        "in_channels": ours["encoder.conv_in.weight"].shape[1],
        "latent_channels": ours["post_quant_conv.weight"].shape[1],
        "block_channels": widths,
        "layers_per_block": layers,
        "mid_attention": "encoder.mid_block.attentions.0.group_norm.weight" in ours,
    }
    if "quantize.embedding.weight" in ours:
        node |= {"_target_": VQ, "codebook_size": len(ours["quantize.embedding.weight"])}
    return node | ({"attention_levels": attends} if any(attends) else {})


def text_encoder(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a CLIP text model in our names. ConfigError where they are not one's."""
    words, places = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    _require(ours, {words: 2, places: 2}, "text encoder")
    layers = _numbers(r"text_model\.encoder\.layers\.(\d{1,4})\..*", ours)
    vocab_size, width = ours[words].shape
    inside = {tensor.shape[0] for k, tensor in ours.items() if k.endswith(".mlp.fc1.weight")} - {4 * width}
    return {
        "vocab_size": vocab_size,
        "max_length": ours[places].shape[0],
        "width": width,
        "layers": 1 + max(layers, default=-1),
        **({"feed_forward": max(inside)} if inside else {}),
    }


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """The numbers in names; longer ones than any network's are left to whom they are unknown tensors."""
    return [int(found[1]) for name in names if (found := re.fullmatch(pattern, name, re.DOTALL))]


def _first(tensors: Mapping[str, Tensor], end: str) -> Tensor | None:
    return next((v for k, v in tensors.items() if k.endswith(end)), None)


def _require(tensors: Mapping[str, Tensor], axes: Mapping[str, int], part: str) -> None:
    missing = [name for name, count in axes.items() if name not in tensors or tensors[name].ndim != count]
    if missing:
        raise ConfigError(
            f"the file's {part} lacks {' and '.join(missing)}, or has it in another shape: it is of another kind, or "
            "damaged. Fetch it again, or give a checkpoint of Stable Diffusion 1 or 2."
        )
