"""Tensors of adapters as they come out of files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.errors import ConfigError


def read_weights(found: Any, what: str) -> Tensor:
    """Weights in float32 and in memory of their own. ConfigError where they are none: `what` opens the message."""
    if not isinstance(found, Tensor):
        raise ConfigError(f"{what} is a {type(found).__name__}, not a tensor: the file is damaged. Fetch it again.")
    if not found.is_floating_point():
        raise ConfigError(f"{what} is of {found.dtype}, not of floating point: quantised files are not read here.")
    weights = found.detach().to(torch.float32, copy=True).contiguous()
    if not weights.isfinite().all():
        raise ConfigError(f"{what} holds infinities or NaN: its training diverged, or was saved in too small a range.")
    return weights
