"""The U-Net's names in CompVis' files. Theirs count blocks in one row, ours (diffusers') by level and kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

PREFIX = "model.diffusion_model."
AVERAGES = "model_ema.diffusion_model"  # before a name without dots
_ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def compvis_names(ours: Iterable[str]) -> dict[str, str]:
    """Our name -> theirs, without the prefix, for all names of a U-Net: a bijection."""
    keys = list(ours)
    layers = len({key.split(".")[3] for key in keys if key.startswith("down_blocks.0.resnets.")})
    attending = {key.split(".")[1] for key in keys if key.startswith("up_blocks.") and ".attentions." in key}
    names = {key: _compvis_name(key, layers, attending) for key in keys}
    assert len(set(names.values())) == len(names)
    return names


# What names without dots consist of; of the digits behind a row of blocks the last one counts within the block.
_WORDS = re.compile(
    r"(?<=put_blocks)\d+(?=\d)|\d+|input_blocks|middle_block|output_blocks|time_embed|in_layers|emb_layers|out_layers"
    r"|skip_connection|transformer_blocks|attn[12]|to_(?:q|k|v|out)|ff|net|proj_in|proj_out|proj|norm[123]?|op|conv|out"
    r"|weight|bias"
)


def from_averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's averages in a file, by CompVis' names without the prefix, for any size.

    Their names there have no dots, as buffers' names may have none.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(AVERAGES):
            name = key.removeprefix(AVERAGES).removeprefix(".")
            dotted = ".".join(_WORDS.findall(name))
            found[dotted if dotted.replace(".", "") == name else name] = tensor
    return found


def _compvis_name(key: str, layers: int, attending: set[str]) -> str:
    for start, theirs in _ENDS.items():
        if key.startswith(start):
            return theirs + key.removeprefix(start)
    if key.startswith("mid_block."):
        _, kind, j, rest = key.split(".", 3)
        return f"middle_block.{2 * int(j)}.{_resnet(rest)}" if kind == "resnets" else f"middle_block.1.{rest}"
    side, i, kind, j, rest = key.split(".", 4)
    row = int(i) * (layers + 1)  # either way a level has layers + 1 blocks: the halving or the further resnet counts
    if kind == "downsamplers":
        return f"input_blocks.{row + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{row + layers}.{2 if i in attending else 1}.{rest}"
    blocks = f"input_blocks.{row + int(j) + 1}" if side == "down_blocks" else f"output_blocks.{row + int(j)}"
    return f"{blocks}.0.{_resnet(rest)}" if kind == "resnets" else f"{blocks}.1.{rest}"


def _resnet(rest: str) -> str:
    name, leaf = rest.split(".", 1)
    return f"{_RESNET[name]}.{leaf}"
