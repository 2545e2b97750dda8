"""Encoders of pictures, small and random, on disk as the hub's."""

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model


def small_dinov2(folder: Path, layers: int = 1) -> str:
    """Its path: 24 channels, patches of 7 pixels, the same weights each time."""
    size = {"hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    return str(folder)
