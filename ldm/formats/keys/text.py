"""The text encoder's names: CLIP's as transformers has them, and OpenCLIP's in Stable Diffusion 2's files."""

from __future__ import annotations

import re

import torch

from ldm.formats.content import State

CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
LAST = 23  # OpenCLIP-H's last layer, counted from 0: Stable Diffusion 2 reads the states before it
_ENDS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_NOT_TEXT = re.compile(r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|embeddings\.position_ids$")
_NOT_READ = re.compile(rf"logit_scale|text_projection|attn_mask|transformer\.resblocks\.{LAST}\..*")


def from_transformers(state: State, layers: int | None = None) -> State:
    """transformers' names in either spelling -> `text_model....`: of a whole CLIP its text half, `layers` of it.

    transformers 5.6 dropped the level `text_model`; older files also carry position_ids, which are 0, 1, 2, ...
    """
    found: State = {}
    for key, tensor in state.items():
        inner = key.removeprefix("text_model.")
        if _NOT_TEXT.match(inner):
            continue
        if layers is not None and inner.startswith("encoder.layers.") and int(inner.split(".")[2]) >= layers:
            continue
        found[f"text_model.{inner}"] = tensor
    return found


def from_openclip(state: State) -> State:
    """Theirs (without the prefix) -> ours: q, k and v apart, without what Stable Diffusion 2 does not read."""
    found: State = {}
    for key, tensor in state.items():
        if _NOT_READ.fullmatch(key):
            continue
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", key)
        joint = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if joint:
            for name, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"text_model.encoder.layers.{joint[1]}.self_attn.{name}_proj.{joint[2]}"] = third
        elif layer and layer[2] in _LAYER:
            found[f"text_model.encoder.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"] = tensor
        else:
            found[_ENDS.get(key, key)] = tensor
    return found


def to_openclip(state: State) -> State:
    """Ours -> theirs (without the prefix): q, k and v joined."""
    ends, leaves = ({v: k for k, v in table.items()} for table in (_ENDS, _LAYER))
    found: State = {}
    for key, tensor in state.items():
        if key in ends:
            found[ends[key]] = tensor
            continue
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", key)
        assert layer is not None, key
        start, leaf, kind = f"transformer.resblocks.{layer[1]}.", layer[2], layer[3]
        if leaf in leaves:
            found[f"{start}{leaves[leaf]}.{kind}"] = tensor
        elif leaf == "self_attn.q_proj":
            parts = [state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            found[f"{start}attn.in_proj_{kind}"] = torch.cat(parts)
    return found
