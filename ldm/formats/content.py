"""What a checkpoint is, whatever file it came from or goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

State = dict[str, Tensor]
Node = dict[str, Any]
PARTS = {"unet": "model", "vae": "autoencoder", "text_encoder": "text_encoder"}  # part of `states` -> node of `config`
# The nodes that a whole model is rebuilt from; the rest of a configuration says how it was trained.
DIFFUSION_NODES = (*PARTS.values(), "scheduler", "parameterization")
_OF_THE_MACHINE = ("pretrained", "tokenizer")
# Arguments that say where a part comes from, how it is run or what others read beside it, not what it is.
ASIDE = (*_OF_THE_MACHINE, "checkpoint", "attention_dropout", "projection_dim", "marks")


def meaning(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a node's arguments, defaults spelled out, those that decide what its tensors mean, in plain lists."""
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items() if k not in ASIDE}
    if found.get("pad") is None:  # the tokenizer's own
        found.pop("pad", None)
    if "attention_levels" in found and not any(found["attention_levels"] or ()):  # of autoencoders: null is none
        found["attention_levels"] = None
    return found


def portable(node: Mapping[str, Any]) -> Node:
    """A node without the paths of the machine that it was written on."""
    return {k: v for k, v in node.items() if k not in _OF_THE_MACHINE}


@dataclass
class Stored:
    """A model in our names: nodes that build it, tensors that fill it, and what goes with them; no module is built.

    Its tensors may still be in their files (mapped), read when they are touched.
    A file may hold some parts only: then the others are in neither `config` nor `states`.
    """

    config: dict[str, Any]  # nodes `model`, `autoencoder`, `text_encoder`, every size spelled; `image_size` where known
    states: dict[str, State]  # "unet", "vae" (with `latents.*`), "text_encoder": as stored
    scheduler_config: dict[str, Any] | None = None  # diffusers' scheduler_config.json as it stands
    tokenizer: Path | None = None  # folder
    folder: Path | None = None  # the checkpoint folder of a run of ours, else the path that was given
    keep: list[Any] = field(default_factory=list, repr=False)  # what must live as long: a folder of unpacked files
