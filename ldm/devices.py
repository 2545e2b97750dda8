"""Numbers of the host on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Numbers on a device. A GPU fetches the host's when it comes to it: nobody waits."""
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def beside(values: Tensor, like: Tensor) -> Tensor:
    """The same on the device, and in the dtype, of another tensor."""
    return on_device(values, like.device).to(like.dtype)
