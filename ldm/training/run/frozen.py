"""Frozen parts held in half precision, and their original tensors kept on disk for the checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import Content, write
from ldm.config.check import module_kind
from ldm.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def frozen_parts(parts: Components, adapted: bool) -> dict[str, nn.Module]:
    """The parts that a latent diffusion run does not train, by their names in a checkpoint folder.

    adapted: adapters are trained, and nothing but them.
    """
    assert parts.text_encoder is not None
    trained = set() if adapted else {"unet", "text_encoder"} if parts.text_encoder.trainable else {"unet"}
    return {name: module for name, module in parts.modules().items() if name not in trained}


def check_frozen_dtype(config: Mapping[str, Any]) -> None:
    """ConfigError for a type that is not known, and where nothing is frozen."""
    given = config["frozen_dtype"]
    if given not in DTYPES:
        raise ConfigError(f"frozen_dtype={given}: choose one of {', '.join(DTYPES)}.")
    if given != "float32" and module_kind(config) == "autoencoder":
        raise ConfigError(f"frozen_dtype={given}: module=autoencoder freezes nothing, so leave frozen_dtype out.")


def cast_frozen(parts: Components, adapted: bool, dtype: torch.dtype) -> None:
    """Casts the weights of frozen parts where they stand. Buffers keep their type: they are units and tables.

    Adapters come after it: what they begin as depends on the weights that they will stand beside.
    """
    for module in frozen_parts(parts, adapted).values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)


def keep_originals(folder: Path, parts: Components, adapted: bool, config: str) -> None:
    """Writes frozen parts as they are now into `folder`, a checkpoint folder of theirs alone.

    A run's first checkpoint links its frozen files from here, so that checkpoints hold what the run started from bit
    for bit, whatever type the weights had in memory; on most disks that takes no room twice.
    """
    shutil.rmtree(folder, ignore_errors=True)
    states = {name: dict(module.state_dict()) for name, module in frozen_parts(parts, adapted).items()}
    write(folder, Content(states, {}, {"global_step": 0}, config), step=0)
