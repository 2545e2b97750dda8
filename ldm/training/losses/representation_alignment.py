"""Representation alignment, REPA (Yu et al. 2025, "Representation Alignment for Generation", Equation 8)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.features.vision import VisionTokens
from ldm.training.losses.term import LossTerm, Step


class RepresentationAlignment(LossTerm):
    """-cos(projector(hidden state at x_t), the encoder's token of the clean picture), the mean over places.

    The encoder is a vision transformer that takes patches (DINOv2 and its kin); it stays as it is and is in no
    checkpoint. Its picture is scaled so that it has a token wherever the hidden state has one. The projector, three
    linear maps with SiLU between, is trained with the network.

    encoder: hub id, or a folder that transformers' `save_pretrained` wrote (safetensors).
    layer: submodule of the network that gives (N,C,h,w), or (N,T,C) tokens in rows.
    width: C.
    """

    def __init__(self, encoder: str, layer: str, width: int, weight: float = 0.5, projector_width: int = 2048):
        super().__init__()
        self.layers, self.width, self.weight = (layer,), width, weight
        tokens = VisionTokens(encoder, "module.losses.alignment.encoder")
        self.projector = nn.Sequential(
            nn.Linear(width, projector_width),
            nn.SiLU(),
            nn.Linear(projector_width, projector_width),
            nn.SiLU(),
            nn.Linear(projector_width, tokens.width),
        )
        self.tokens = tokens

    def start(self) -> None:
        self.tokens.start()

    def forward(self, step: Step) -> Tensor:
        if "image" not in step.batch:
            raise ConfigError(
                "representation alignment reads the pictures, and these shards hold latents only: give shards= of "
                "images, and leave the stage encode out (stages.encode=false)."
            )
        tokens, (height, width) = self._hidden(step)
        wanted = self.features(step.batch["image"], height, width)
        wanted = wanted.repeat_interleave(len(tokens) // len(wanted), dim=0)
        return -F.cosine_similarity(self.projector(tokens), wanted, dim=-1).mean(dim=1)

    def _hidden(self, step: Step) -> tuple[Tensor, tuple[int, int]]:
        """The hidden state as (N,T,C), and how many rows and columns T is."""
        hidden = step.hidden[self.layers[0]]
        if hidden.ndim == 4:
            size, hidden = (hidden.shape[2], hidden.shape[3]), hidden.flatten(2).transpose(1, 2)
        else:  # patches of the latent
            tall, wide = step.prediction.x0.shape[-2:]
            patch = math.isqrt(tall * wide // hidden.shape[1])
            size = (tall // patch, wide // patch)
        if size[0] * size[1] != hidden.shape[1] or hidden.shape[2] != self.width:
            raise ConfigError(
                f"module.losses.alignment.layer={self.layers[0]} gives {hidden.shape[1]} places of {hidden.shape[2]} "
                f"channels, and width={self.width}: set module.losses.alignment.width={hidden.shape[2]}."
            )
        return hidden, size

    def features(self, images: Tensor, height: int, width: int) -> Tensor:
        """The encoder's tokens of pictures, uint8 (B,3,H,W) -> (B, height x width, D)."""
        return self.tokens(images.float() / 255, height, width)
