"""What a checkpoint is, whatever file it came from or goes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

State = dict[str, Tensor]
Node = dict[str, Any]
PARTS = {"unet": "model", "vae": "autoencoder", "text_encoder": "text_encoder"}  # part of `states` -> node of `config`


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
