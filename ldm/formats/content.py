"""What a checkpoint is, whatever file it came from or goes to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import ConfigError

State = dict[str, Tensor]
Node = dict[str, Any]
PARTS = {"unet": "model", "vae": "autoencoder", "text_encoder": "text_encoder"}  # part of `states` -> node of `config`


@dataclass
class Checkpoint:
    """A model in our names: nodes that build it, tensors that fill it, and what goes with them.

    A file may hold some parts only: then the others are in neither `config` nor `states`.
    """

    config: dict[str, Any]  # nodes `model`, `autoencoder`, `text_encoder`, every size spelled; `image_size` where known
    states: dict[str, State]  # "unet", "vae" (with `latents.*`), "text_encoder": as stored
    scheduler_config: dict[str, Any] | None = None  # diffusers' scheduler_config.json as it stands
    tokenizer: Path | None = None  # folder
    keep: list[Any] = field(default_factory=list, repr=False)  # what must live as long: a folder of unpacked files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; one line when the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} is missing: fetch the whole folder again.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): it was cut short or edited. Fetch it again.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a JSON {type(found).__name__} where settings belong. Fetch it again.")
    return found
