"""The convolutional half of the U-Net and of the autoencoders."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.block import Block
from ldm.models.recompute import call


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x)): the one place where a fused kernel would go."""

    recompute = False  # True: the normalised map is not kept for the backward pass

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        return call(self._normalise, x, recompute=self.recompute)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution, stored as one and run as the linear map over channels that it is.

    Published files hold (C', C, 1, 1) weights; on the CPU a convolution of that size is a slow loop, a product is not.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H,W)
        pixels = rearrange(x, "b c h w -> b h w c")
        return rearrange(F.linear(pixels, self.weight.flatten(1), self.bias), "b h w c -> b c h w")


class ResnetBlock(Block):
    """Two 3x3 convolutions around a shortcut; the time, if any, is added between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        eps: float,  # of GroupNorm: 1e-5 in Stable Diffusion's U-Net, 1e-6 in its autoencoder
        time_width: int | None = None,  # None: no time (autoencoders)
    ):
        super().__init__()
        self.norm1 = GroupNormSiLU(norm_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, out_channels)
        self.norm2 = GroupNormSiLU(norm_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:  # (B,C,H,W), (B,D) after its SiLU -> (B,C',H,W)
        h = self.conv1(self.norm1(x))
        if self.time_emb_proj is not None:
            h = h + rearrange(self.time_emb_proj(time), "b c -> b c 1 1")
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Half the height and width, rounded up: a 3x3 convolution of stride 2, padded on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2)
        return self.conv(x)


class DownsampleRightBottom(nn.Module):
    """Half the height and width, as autoencoders do it: one row and one column of zeros at the far ends only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # (B,C,h,w) -> (B,C,height,width)
        return self.conv(F.interpolate(x, size=(height, width), mode="nearest"))
