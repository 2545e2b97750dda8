"""The deep compression autoencoder: images to a very small grid of wide latents, without noise, and back.

Chen et al. 2024, "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models", section 3.2: each
change of resolution learns what is to be added to a reshuffling of its own input. State-dict keys are diffusers'
AutoencoderDC's, plus `latents.*`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn

from ldm.autoencoders.efficient_vit import EfficientViTBlock, Norm, ResBlock, RMSNorm
from ldm.autoencoders.kl import Autoencoder, checked_flags
from ldm.autoencoders.latents import Point, Posterior
from ldm.errors import ConfigError

Down = Literal["conv", "pixel_unshuffle"]
Up = Literal["interpolate", "pixel_shuffle"]


class AutoencoderDC(Autoencoder):
    """`encode` gives one z, to the bit the same each time; nothing but reconstruction shapes the latents."""

    moments_per_channel = 1
    regulariser_names = ()

    def __init__(
        self,
        *,
        in_channels: int = 3,  # of the images
        latent_channels: int = 32,  # of the latents
        block_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024),  # of each level, finest first; each halves
        encoder_layers: Sequence[int] = (2, 2, 2, 3, 3, 3),  # blocks a level; finest 0: no level, the image is halved
        decoder_layers: Sequence[int] = (3, 3, 3, 3, 3, 3),  # as in the encoder, finest first
        attention_levels: Sequence[bool] | None = (False, False, False, True, True, True),  # of EfficientViT blocks
        head_dim: int = 32,  # width of a head of linear attention
        kernel_sizes: Sequence[int] | None = (5,),  # neighbourhoods that further heads see, odd; null: pixels only
        downsample: Down = "conv",  # of stride 2, or one of a quarter of the channels whose pixels become channels
        upsample: Up = "interpolate",  # nearest neighbours, then a convolution; or one whose channels become pixels
        decoder_norm: Norm = "rms",  # of its residual blocks, with SiLU; batch: published statistics, with ReLU
        pretrained: str | None = None,  # hub id or folder of published weights, read by the trainer; null: none
    ):
        super().__init__(latent_channels, len(block_channels), pretrained)
        flags, sizes = checked_flags(attention_levels, block_channels), tuple(kernel_sizes or ())
        _check(block_channels, latent_channels, flags, head_dim, sizes)
        _check_layers("encoder_layers", encoder_layers, block_channels)
        _check_layers("decoder_layers", decoder_layers, block_channels)
        self.head_dim, self.decoder_norm = head_dim, decoder_norm  # which no tensor's shape tells
        attention = (flags, head_dim, sizes)
        self.encoder = Encoder(in_channels, latent_channels, block_channels, encoder_layers, attention, downsample)
        self.decoder = Decoder(
            latent_channels, in_channels, block_channels, decoder_layers, attention, upsample, decoder_norm
        )

    @property
    def last_layer(self) -> nn.Parameter:
        last = self.decoder.conv_out
        return (last.conv if isinstance(last, Upsample) else last).weight  # type: ignore[return-value, union-attr]

    def posterior(self, moments: Tensor) -> Posterior:
        return Point(moments)

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Zeros: a point has no finite KL to weigh."""
        return posterior.mean.new_zeros(len(posterior.mean)), {}


Attention = tuple[Sequence[bool], int, Sequence[int]]  # flags a level, width of a head, neighbourhoods


class Encoder(nn.Module):
    """Blocks and halvings, then z: a convolution of the last map added to the means of neighbouring channels of it."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_channels: Sequence[int],
        layers: Sequence[int],
        attention: Attention,
        how: Down,
    ):
        super().__init__()
        first = block_channels[0] if layers[0] else block_channels[1]
        self.conv_in = (
            nn.Conv2d(in_channels, first, 3, padding=1)
            if layers[0]
            else Downsample(in_channels, first, how, shortcut=False)
        )
        self.down_blocks = nn.ModuleList()
        for level, channels in enumerate(block_channels):
            blocks = _blocks(level, channels, layers[level], attention, "rms")
            if blocks and level < len(block_channels) - 1:
                blocks.append(Downsample(channels, block_channels[level + 1], how))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(block_channels[-1], latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # (B,3,H,W) -> (B,C,H/f,W/f)
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x) + _averaged(x, self.conv_out.out_channels)


class Decoder(nn.Module):
    """The way back: z repeated added to its first convolution, then blocks and doublings, coarsest first.

    `up_blocks` are numbered from the finest level, as in the encoder, and walked backwards.
    """

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_channels: Sequence[int],
        layers: Sequence[int],
        attention: Attention,
        how: Up,
        norm: Norm,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, block_channels[-1], 3, padding=1)
        levels = []
        for level, channels in reversed(list(enumerate(block_channels))):
            blocks = _blocks(level, channels, layers[level], attention, norm)
            if blocks and level < len(block_channels) - 1:
                blocks.insert(0, Upsample(block_channels[level + 1], channels, how))
            levels.append(nn.Sequential(*blocks))
        self.up_blocks = nn.ModuleList(levels[::-1])
        last = block_channels[0] if layers[0] else block_channels[1]
        self.norm_out = RMSNorm(last)
        self.conv_out = (
            nn.Conv2d(last, out_channels, 3, padding=1)
            if layers[0]
            else Upsample(last, out_channels, how, shortcut=False)
        )

    def forward(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,3,fh,fw)
        x = self.conv_in(z) + _repeated(z, self.conv_in.out_channels)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(F.relu(self.norm_out(x)))


class Downsample(nn.Module):
    """Half the height and width: a convolution, added to the means of groups of the channels that pixels become."""

    def __init__(self, in_channels: int, out_channels: int, how: Down, shortcut: bool = True):
        super().__init__()
        self.out_channels, self.shortcut = out_channels, shortcut
        self.unshuffles = how == "pixel_unshuffle"
        width, stride = (out_channels // 4, 1) if self.unshuffles else (out_channels, 2)
        self.conv = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H/2,W/2)
        y = self.conv(x)
        if self.unshuffles:
            y = F.pixel_unshuffle(y, 2)
        return y + _averaged(F.pixel_unshuffle(x, 2), self.out_channels) if self.shortcut else y


class Upsample(nn.Module):
    """Twice the height and width: a convolution, added to the pixels that repeated channels become."""

    def __init__(self, in_channels: int, out_channels: int, how: Up, shortcut: bool = True):
        super().__init__()
        self.out_channels, self.shortcut = out_channels, shortcut
        self.shuffles = how == "pixel_shuffle"
        self.conv = nn.Conv2d(in_channels, 4 * out_channels if self.shuffles else out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',2H,2W)
        if self.shuffles:
            y = F.pixel_shuffle(self.conv(x), 2)
        else:
            y = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return y + F.pixel_shuffle(_repeated(x, 4 * self.out_channels), 2) if self.shortcut else y


def _averaged(x: Tensor, channels: int) -> Tensor:  # (B,GC,H,W) -> (B,C,H,W)
    """Means of G neighbouring channels."""
    return reduce(x, "b (c g) h w -> b c h w", "mean", c=channels)


def _repeated(x: Tensor, channels: int) -> Tensor:  # (B,C,H,W) -> (B,GC,H,W)
    """Every channel G times, side by side."""
    return repeat(x, "b c h w -> b (c g) h w", g=channels // x.shape[1])


def _blocks(level: int, channels: int, layers: int, attention: Attention, norm: Norm) -> list[nn.Module]:
    flags, head_dim, sizes = attention
    if flags[level]:
        return [EfficientViTBlock(channels, head_dim, sizes) for _ in range(layers)]
    return [ResBlock(channels, norm) for _ in range(layers)]


def _check(
    widths: Sequence[int], latent_channels: int, flags: Sequence[bool], head_dim: int, sizes: Sequence[int]
) -> None:
    """ConfigError for widths between which channels cannot be averaged and repeated whole, and for odd heads."""
    if widths[-1] % latent_channels:
        raise ConfigError(
            f"autoencoder.latent_channels={latent_channels} does not divide the coarsest level's {widths[-1]} channels "
            "(autoencoder.block_channels), which are averaged to them: give a divisor of it."
        )
    for fine, coarse in pairwise(widths):
        if 4 * fine % coarse or coarse % 4:
            raise ConfigError(
                f"autoencoder.block_channels={list(widths)}: the 4 x {fine} channels that pixels become cannot be "
                f"averaged to {coarse}. Give multiples of 4, each a divisor of four times the one before it."
            )
    bad = [width for width, flag in zip(widths, flags, strict=True) if flag and width % head_dim]
    if bad:
        raise ConfigError(
            f"autoencoder.head_dim={head_dim} does not divide the {bad[0]} channels of a level with attention: give a "
            "divisor of all widths that autoencoder.attention_levels marks."
        )
    if any(size % 2 == 0 for size in sizes):
        raise ConfigError(f"autoencoder.kernel_sizes={list(sizes)}: neighbourhoods have odd sizes, such as [5].")


def _check_layers(key: str, layers: Sequence[int], widths: Sequence[int]) -> None:
    if len(layers) != len(widths):
        raise ConfigError(
            f"autoencoder.{key} has {len(layers)} numbers for {len(widths)} levels of autoencoder.block_channels: give "
            "one a level, finest first."
        )
    if min(layers) < 0 or 0 in layers[1:] or list(layers) == [0]:
        raise ConfigError(
            f"autoencoder.{key}={list(layers)}: each level has a block at least, for it changes the resolution; only "
            "the finest of several may have 0."
        )
