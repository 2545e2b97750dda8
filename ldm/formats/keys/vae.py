"""The autoencoder's names in CompVis' files and in the first diffusers ones.

CompVis counts the decoder's levels from the finest, diffusers from the coarsest, and stores attention's maps as 1x1
convolutions, (C, C, 1, 1), where ours are (C, C). Attention at levels (kl-f16, kl-f32) is part of the table.
"""

from __future__ import annotations

import re

from torch import Tensor

from ldm.autoencoders.vq import LEARNING
from ldm.formats.content import State

PREFIX = "first_stage_model."
# What stands before the leaf: ours, theirs.
_PLACES = [
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder\.down\.(\d+)\.block\.(\d+)"),
    (r"encoder\.down_blocks\.(\d+)\.attentions\.(\d+)", r"encoder\.down\.(\d+)\.attn\.(\d+)"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder\.down\.(\d+)\.downsample"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder\.up\.(\d+)\.block\.(\d+)"),
    (r"decoder\.up_blocks\.(\d+)\.attentions\.(\d+)", r"decoder\.up\.(\d+)\.attn\.(\d+)"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder\.up\.(\d+)\.upsample"),
]
for _half in ("encoder", "decoder"):
    _PLACES += [
        (rf"{_half}\.mid_block\.resnets\.0", rf"{_half}\.mid\.block_1"),
        (rf"{_half}\.mid_block\.resnets\.1", rf"{_half}\.mid\.block_2"),
        (rf"{_half}\.mid_block\.attentions\.0", rf"{_half}\.mid\.attn_1"),
        (rf"{_half}\.conv_norm_out", rf"{_half}\.norm_out"),
    ]
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers' first names


def is_compvis(names: object) -> bool:
    """Whether an autoencoder's names, without the prefix, are CompVis' (else diffusers')."""
    return any(re.match(r"(encoder|decoder)\.(mid|down|up)\.", str(name)) for name in names)  # type: ignore[attr-defined]


def from_compvis(state: State) -> State:
    """Theirs (without the prefix) -> ours; a name that is in no table stays as it is."""
    levels = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("encoder.down.")), default=0)
    return {name: _linear(name, tensor) for name, tensor in ((_ours(k, levels), v) for k, v in state.items())}


def to_compvis(state: State) -> State:
    """Ours, without `latents.*` and what a codebook learns from, -> theirs (without the prefix)."""
    levels = len({k.split(".")[2] for k in state if k.startswith("encoder.down_blocks.")})
    carried = {k: v for k, v in state.items() if not k.startswith("latents.") and k not in LEARNING}
    return {_theirs(k, levels): _convolution(k, v) for k, v in carried.items()}


def from_diffusers(state: State) -> State:
    """Any diffusers spelling -> ours: attention's first names, and its maps as convolutions."""
    renamed = {}
    for key, tensor in state.items():
        for old, new in _OLD_ATTENTION.items():
            key = re.sub(rf"(attentions\.\d+\.){old}\.", rf"\g<1>{new}.", key)
        renamed[key] = _linear(key, tensor)
    return renamed


def _ours(key: str, levels: int) -> str:
    for ours, theirs in _PLACES:
        if found := re.match(theirs + r"\.", key):
            leaf = key[found.end() :]
            attends = "attentions" in ours
            inverse = {v: k for k, v in _ATTENTION.items()} if attends else {"nin_shortcut": "conv_shortcut"}
            return _fill(ours, found, levels) + "." + _renamed(leaf, inverse)
    return key


def _theirs(key: str, levels: int) -> str:
    for ours, theirs in _PLACES:
        if found := re.match(ours + r"\.", key):
            leaf = key[found.end() :]
            table = _ATTENTION if "attentions" in ours else {"conv_shortcut": "nin_shortcut"}
            return _fill(theirs, found, levels) + "." + _renamed(leaf, table)
    return key


def _fill(pattern: str, found: re.Match[str], levels: int) -> str:
    """The pattern as a name, with the numbers found; the decoder's level turned round."""
    numbers = [int(n) for n in found.groups()]
    if "decoder" in pattern and numbers:
        numbers[0] = levels - 1 - numbers[0]
    for number in numbers:
        pattern = pattern.replace(r"(\d+)", str(number), 1)
    return pattern.replace("\\", "")


def _renamed(leaf: str, table: dict[str, str]) -> str:
    stem, dot, kind = leaf.rpartition(".")
    return table.get(stem, stem) + dot + kind


_MAPS = re.compile(r".*attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


def _linear(ours: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, 0, 0] if _MAPS.fullmatch(ours) and tensor.ndim == 4 else tensor


def _convolution(ours: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if _MAPS.fullmatch(ours) else tensor
