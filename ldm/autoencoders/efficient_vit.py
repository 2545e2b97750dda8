"""What deep compression autoencoders repeat: residual convolutions, and EfficientViT's blocks of linear attention.

Chen et al. 2024 (DC-AE), appendix; Cai et al. 2023 (EfficientViT), section 3.1. State-dict keys are diffusers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ldm.devices import without_autocast
from ldm.models.block import Block
from ldm.models.resnet import Conv1x1

Norm = Literal["rms", "batch"]


class ResBlock(Block):
    """x + norm(conv(act(conv(x)))): unlike Stable Diffusion's, normalised last and once."""

    def __init__(self, channels: int, norm: Norm = "rms"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm: nn.Module = RMSNorm(channels) if norm == "rms" else FixedBatchNorm(channels)
        self.act: nn.Module = nn.SiLU() if norm == "rms" else nn.ReLU()  # as they are published, together

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class EfficientViTBlock(Block):
    """Pixels exchange by linear attention, then each is worked on by a gated convolution."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int]):
        super().__init__()
        self.attn = LinearAttention(channels, head_dim, kernel_sizes)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        return self.conv_out(self.attn(x))


class LinearAttention(nn.Module):
    """Every pixel attends to every other at a cost linear in their number: scores are relu(q) . relu(k).

    By associativity sum_j (q_i . k_j) v_j = (sum_j v_j k_j^T) q_i (Cai et al. 2023, equation 2). Heads of one scale see
    pixels; those of each kernel size see neighbourhoods of that size, which a depthwise convolution has gathered.
    Sums over all pixels are float32 at least, whatever the network runs in. (Published code has a second formula, of
    the same value, for maps of up to head_dim pixels.)
    """

    EPS = 1e-15

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int]):
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(Neighbourhood(3 * inner, 3 * heads, size) for size in kernel_sizes)
        self.to_out = nn.Linear(inner * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        qkv = rearrange(F.linear(rearrange(x, "b c h w -> b h w c"), weight), "b h w c -> b c h w")
        scales = torch.cat([qkv, *(gather(qkv) for gather in self.to_qkv_multiscale)], dim=1)
        # A head's q, k and v are neighbours among all channels: the maps to_q, to_k, to_v are names of thirds of one.
        q, k, v = rearrange(scales, "b (g qkv d) h w -> qkv b g d (h w)", qkv=3, d=self.head_dim)
        heads = rearrange(self.attend(q, k, v).to(x.dtype), "b g d (h w) -> b h w (g d)", h=x.shape[-2])
        return x + self.norm_out(rearrange(self.to_out(heads), "b h w c -> b c h w"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B,G,D,L) x3 -> (B,G,D,L) of at least float32
        with without_autocast(q):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k, v = q.to(wide).relu(), k.to(wide).relu(), v.to(wide)
            total = einsum(einsum(v, k, "b g d l, b g e l -> b g d e"), q, "b g d e, b g e l -> b g d l")
            weights = einsum(k.sum(dim=-1), q, "b g e, b g e l -> b g l")
            return total / (weights + self.EPS)[:, :, None]


class Neighbourhood(nn.Module):
    """q, k and v of each pixel from those around it: a depthwise convolution, then a map within each head's third.

    The map is stored as the grouped 1x1 convolution that published files hold, and run as the product that it is.
    """

    def __init__(self, channels: int, groups: int, kernel_size: int):
        super().__init__()
        self.groups = groups
        self.proj_in = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        maps = rearrange(self.proj_out.weight, "(g o) i 1 1 -> g o i", g=self.groups)
        pixels = rearrange(self.proj_in(x), "b (g i) h w -> b g i (h w)", g=self.groups)
        return rearrange(maps @ pixels, "b g o (h w) -> b (g o) h w", h=x.shape[-2])


class GatedConv(nn.Module):
    """MBConv with a gate: widened eightfold, convolved a channel at a time, one half times SiLU of the other."""

    RATIO = 4

    def __init__(self, channels: int):
        super().__init__()
        inner = self.RATIO * channels
        self.conv_inverted = Conv1x1(channels, 2 * inner)
        self.conv_depth = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.conv_point = Conv1x1(inner, channels, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return x + self.norm(self.conv_point(value * F.silu(gate)))


class RMSNorm(nn.Module):
    """Each pixel's channels over their root mean square (Zhang & Sennrich 2019), times a weight, plus a bias.

    The root is taken in float32 at least.
    """

    EPS = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.EPS)
        weight, bias = (rearrange(p, "c -> c 1 1") for p in (self.weight, self.bias))
        return torch.addcmul(bias, (wide * scale).to(weight.dtype), weight)  # one pass for both


class FixedBatchNorm(nn.BatchNorm2d):
    """BatchNorm by its stored statistics in training too, so that no picture depends on those beside it.

    For weights that were published with it. They are fine-tuned as they are: the statistics stay.
    """

    def train(self, mode: bool = True) -> FixedBatchNorm:
        return super().train(False)

    def __init__(self, channels: int):
        super().__init__(channels)
        self.eval()
