"""What diffusion transformers are made of: patches, their positions, and layers modulated by one vector an image.

Peebles and Xie 2023 (DiT), section 3.2; names are diffusers', so that published weights map by a short table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import ConfigError

TIME_WAVES = 256  # sinusoids that tell the time


class PatchEmbedding(nn.Module):
    """Non-overlapping patches as tokens, with their places added.

    Stored as a strided convolution, run as the linear map that it is: on the CPU that is faster.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int, sample_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.trained_patches = sample_size // patch_size  # a side, in training
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,L,D), rows first
        p = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        tokens = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        height, width = x.shape[-2] // p, x.shape[-1] // p
        return tokens + positions(height, width, tokens.shape[-1], self.trained_patches, x.device).to(tokens)


def positions(height: int, width: int, channels: int, trained: int, device: torch.device | None = None) -> Tensor:
    """(L,D) float32: sines and cosines of a patch's column in the first half of the channels, of its row in the rest.

    Columns and rows of the trained size are 0, 1, ..., trained - 1; other sizes are scaled about it, centre of patch to
    centre of patch, so that a larger picture is a finer sampling of the same plane.
    """
    frequencies = torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4)
    frequencies = torch.exp(-math.log(10_000) * frequencies)

    def waves(count: int) -> Tensor:  # -> (count, D/2)
        place = (torch.arange(count, dtype=torch.float32, device=device) + 0.5) * (trained / count) - 0.5
        angles = place[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns, rows = waves(width), waves(height)
    both = [columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)]
    return rearrange(torch.cat(both, dim=-1), "h w d -> (h w) d")


def unpatch(tokens: Tensor, patch_size: int, height: int) -> Tensor:  # (B,L,p*p*C), rows of patches -> (B,C,H,W)
    p = patch_size
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)


class Modulation(nn.Module):
    """adaLN-Zero: one vector an image -> shifts, scales and gates of its tokens; all 0 at first."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> Sequence[Tensor]:  # (B,D) after its SiLU -> count times (B,1,D)
        return self.linear(vector)[:, None].chunk(self.count, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (B,L,D), (B,1,D), (B,1,D) -> (B,L,D)
    """LayerNorm whose gain and bias are the image's own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class MLP(nn.Module):
    """Four times wider, GELU, and back."""

    def __init__(self, width: int):
        super().__init__()
        # The middle slot is a dropout in published models: it holds no weights but counts in the names.
        self.net = nn.Sequential(_ProjectedGELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B,L,D) -> (B,L,D)
        return self.net(x)


class _ProjectedGELU(nn.Module):
    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


def initialise(network: nn.Module, silent: Sequence[nn.Module]) -> None:
    """DiT's first weights: Xavier for linear maps, biases 0, narrow time layers; `silent` maps and modulations are 0.

    With silent gates every block is the identity, and with a silent last layer the untrained answer is 0.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if "time_embedding" in name:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    modulations = [module.linear for module in network.modules() if isinstance(module, Modulation)]
    for module in (*modulations, *silent):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def check_sizes(width: int, num_heads: int, patch_size: int, sample_size: int, checkpoint: str) -> None:
    """Refuses widths, heads, patches and sizes that do not fit each other."""
    if width % num_heads or width % 4:
        fits = ", ".join(str(n) for n in (2, 3, 4, 6, 8, 12, 16) if width % n == 0)
        raise ConfigError(
            f"model.width={width} must divide by model.num_heads={num_heads}, and by 4 for the sinusoids of rows and "
            f"columns: choose model.num_heads among {fits or 'the divisors of a multiple of 4'}."
        )
    if sample_size % patch_size:
        raise ConfigError(
            f"model.sample_size={sample_size} (latent pixels a side in training) does not divide into patches of "
            f"model.patch_size={patch_size}: set model.sample_size={-(-sample_size // patch_size) * patch_size}."
        )
    if checkpoint not in ("none", "blocks"):
        raise ConfigError(f"model.checkpoint={checkpoint} is not known to transformers: choose one of none, blocks.")


def check_patches(patch_size: int, height: int, width: int) -> None:
    """Refuses latents that patches do not tile."""
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"latents of {height}x{width} do not divide into patches of {patch_size}: choose a height and a width in "
            f"pixels that are multiples of {patch_size} times the autoencoder's factor."
        )
