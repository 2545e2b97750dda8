"""Networks that tell pictures from reconstructions, place by place."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a logit for each patch of the picture, 70x70 pixels with three layers.

    scales: so many of them, each on a picture of half the size of the one before (Wang et al. 2018, Section 3.2).
    norm: batch, as published, of the micro-batch alone; group; or none, which R1 penalties want.
    """

    def __init__(
        self, width: int = 64, layers: int = 3, scales: int = 1, norm: Literal["batch", "group", "none"] = "batch"
    ):
        super().__init__()
        for name, value in (("width", width), ("layers", layers), ("scales", scales)):
            if value < 1:
                raise ConfigError(f"module.losses.adversarial.discriminator.{name}={value}: must be at least 1.")
        self.scales = nn.ModuleList([_patches(width, layers, norm) for _ in range(scales)])

    def forward(self, images: Tensor) -> Tensor:  # (B,3,H,W) -> (B,places)
        found = []
        for network in self.scales:
            found.append(network(images).flatten(1))
            images = F.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
        return torch.cat(found, dim=1)


def _patches(width: int, layers: int, norm: str) -> nn.Sequential:
    """Convolutions of 4x4: the first ones halve, the last two do not (Isola et al. 2017, Appendix 6.1.2)."""
    modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    channels = width
    for layer in range(1, layers + 1):
        wider = width * min(2**layer, 8)
        modules.append(
            nn.Conv2d(channels, wider, 4, stride=1 if layer == layers else 2, padding=1, bias=norm == "none")
        )
        if norm == "batch":
            modules.append(nn.BatchNorm2d(wider, track_running_stats=False))
        elif norm == "group":
            modules.append(nn.GroupNorm(min(32, wider // 4), wider))
        modules.append(nn.LeakyReLU(0.2))
        channels = wider
    modules.append(nn.Conv2d(channels, 1, 4, padding=1))
    network = nn.Sequential(*modules)
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1.0, std=0.02)
    return network


class ResidualDiscriminator(nn.Module):
    """StyleGAN2's (Karras et al. 2020): residual blocks that halve, blurred, and the spread within the micro-batch.

    Its last layer is a convolution, so that pictures of every size have a logit: the mean over what is left of them.
    width: channels at full size, doubled at each of `layers` halvings up to eight times that.
    """

    def __init__(self, width: int = 64, layers: int = 4):
        super().__init__()
        if width < 1 or layers < 1:
            raise ConfigError(f"module.losses.adversarial.discriminator: width={width}, layers={layers}: at least 1.")
        widths = [width * min(2**layer, 8) for layer in range(layers + 1)]
        self.conv_in = nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList([_Halving(a, b) for a, b in pairwise(widths)])
        self.conv = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.conv_out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, images: Tensor) -> Tensor:  # (B,3,H,W) -> (B,1)
        x = F.leaky_relu(self.conv_in(images), 0.2)
        for block in self.blocks:
            x = block(x)
        spread = (x.float().var(dim=0, correction=0) + 1e-8).sqrt().mean().to(x.dtype)  # Karras et al. 2018, Section 3
        x = torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], dim=1)
        return self.conv_out(F.leaky_relu(self.conv(x), 0.2)).flatten(1).mean(dim=1, keepdim=True)


class _Halving(nn.Module):
    """Two convolutions beside a 1x1 one, each path blurred before it is halved."""

    kernel: Tensor

    def __init__(self, channels: int, wider: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, wider, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, wider, 1, bias=False)
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H/2,W/2)
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(self._halved(h)), 0.2)
        return (h + self.shortcut(self._halved(x))) / 2**0.5

    def _halved(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=x.shape[1])
