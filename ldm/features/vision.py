"""Tokens of a frozen vision transformer: what representations are aligned to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ldm.errors import ConfigError
from ldm.features.frozen import Frozen
from ldm.features.vgg import MEAN, STD


class VisionTokens(nn.Module):
    """The last hidden states of a vision transformer that takes patches (DINOv2 and its kin); it stays as it is.

    encoder: hub id, or a folder that transformers' `save_pretrained` wrote (safetensors). Only its configuration is
        read before `start`.
    key: what that stands under in a configuration, for errors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: str, key: str):
        super().__init__()
        self.name = encoder
        remedy = "Give a hub id such as facebook/dinov2-base, or a folder that save_pretrained wrote."
        config = read_config(encoder, key, remedy)
        if not isinstance(getattr(config, "patch_size", None), int):
            raise ConfigError(
                f"{key}={encoder} ({config.model_type}) does not read a picture in patches: give a vision transformer "
                "such as facebook/dinov2-base."
            )
        self.patch, self.width = config.patch_size, config.hidden_size
        # DINOv2 fits its positions to any picture by itself.
        self._options = {} if "dinov2" in config.model_type else {"interpolate_pos_encoding": True}
        for name, values in (("mean", MEAN), ("std", STD)):  # buffers, so that no step copies them to the device
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.encoder = Frozen()

    def start(self) -> None:
        """Opens the weights, once."""
        if self.encoder.network is None:
            self.encoder.hold(AutoModel.from_pretrained(self.name, use_safetensors=True))

    @torch.no_grad()
    def forward(self, pixels: Tensor, height: int, width: int) -> Tensor:  # (B,3,H,W) in [0, 1] -> (B,height*width,D)
        """The picture is scaled so that it has height x width tokens."""
        self.start()
        size = (height * self.patch, width * self.patch)
        scaled = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        states = self.encoder(pixel_values=(scaled - self.mean) / self.std, **self._options).last_hidden_state
        return states[:, -height * width :]  # before them stand its class token and registers


def read_config(encoder: str, key: str, remedy: str) -> Any:
    """The configuration of a hub id or folder, without its weights.

    key: what it stands under, for the error. ConfigError, with the remedy, where there is none.
    """
    try:
        return AutoConfig.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"{key}={encoder}: transformers finds no model there ({reason}). {remedy}") from error
