"""The autoencoders' convolutional networks, what all kinds share, and the KL-regularised kind of Stable Diffusion.

Rombach et al. 2022, section 3.1 and appendix G; state-dict keys are diffusers', plus `latents.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from ldm.autoencoders.latents import LatentSpace, Posterior
from ldm.errors import ConfigError
from ldm.models.attention import attention
from ldm.models.resnet import Conv1x1, DownsampleRightBottom, GroupNormSiLU, ResnetBlock, Upsample
from ldm.models.unet import check_groups

EPS = 1e-6  # of every GroupNorm here


class Autoencoder(nn.Module):
    """`encode` and `decode` speak raw latents; `latents` knows what makes them standardised ones.

    A kind builds `encoder` and `decoder` and says how a picture becomes the numbers of its latents' law (`moments`,
    `moments_per_channel` of them a channel), what law that is (`posterior`), and what holds the latents in check while
    it is trained (`regulariser`, which logs `regulariser_names`; nothing does, if that is all zeros). What learns by
    other means than gradients does so in `end_step`.
    """

    moments_per_channel: ClassVar[int]
    regulariser_names: tuple[str, ...]  # of a class, or of one with options
    one_scale: ClassVar[bool] = False  # whether standardised latents share one scale in all channels
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, latent_channels: int, levels: int, pretrained: str | None):
        super().__init__()
        self.pretrained = pretrained
        self.factor = 2 ** (levels - 1)  # image pixels for one latent pixel, each way
        self.latents = LatentSpace(latent_channels, self.one_scale)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight: there the adversarial gradient is measured (Esser et al. 2021, eq. 7)."""
        return self.decoder.conv_out.weight  # type: ignore[return-value, union-attr]

    @property
    def last_encoder_layer(self) -> nn.Parameter:
        """The encoder's last weight: there the gradients of terms on latents are measured (Yao et al. 2025)."""
        return self.encoder.conv_out.weight  # type: ignore[return-value, union-attr]

    def moments(self, images: Tensor) -> Tensor:  # (B,3,H,W) -> (B,MC,H/f,W/f), M of them a channel
        return self.encoder(images)

    def posterior(self, moments: Tensor) -> Posterior:  # (B,MC,h,w), from the encoder or a cache
        raise NotImplementedError(f"{type(self).__name__} must say what its encoder's output means.")

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,), added to the reconstruction error of each image, and (B,) values to log, by `regulariser_names`."""
        raise NotImplementedError(f"{type(self).__name__} must say what holds its latents in check.")

    def begin_batch(self, positions: range, total: int) -> None:
        """Called in training before each `regulariser`: where its images stand in the step's batch of `total`."""

    def end_step(self, summed: Callable[[Tensor], None], seed: int, step: int) -> None:
        """Called after each optimizer step, by all processes: what is learnt from sums over the step's micro-batches.

        summed: adds a tensor on its device over all processes, in place. seed: of draws, which differ by step too.
        """

    def encode(self, images: Tensor) -> Posterior:  # (B,3,H,W) in [-1, 1] -> q(z | image), (B,C,H/f,W/f)
        self._check_size(*images.shape[-2:])
        return self.posterior(self.moments(images.to(self.last_layer.dtype)))

    def decode(self, z: Tensor) -> Tensor:  # (B,C,h,w) raw -> (B,3,fh,fw)
        return self.decoder(z.to(self.last_layer.dtype))

    def _check_size(self, height: int, width: int) -> None:
        f = self.factor
        if height % f or width % f:
            sizes = sorted({(h, w) for h in _neighbours(height, f) for w in _neighbours(width, f)})
            raise ConfigError(
                f"an image of {height}x{width} does not divide by the autoencoder's factor {f}: resize or crop it to "
                f"{' or '.join(f'{h}x{w}' for h, w in sizes)} (height x width)."
            )


class GroupNormAutoencoder(Autoencoder):
    """The networks of Rombach et al. 2022: resnets with GroupNorm, and a 1x1 convolution at either side of z."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_channels: Sequence[int],
        layers_per_block: int,
        norm_groups: int,
        attention_levels: Sequence[bool] | None,
        mid_attention: bool,
        pretrained: str | None,
    ):
        super().__init__(latent_channels, len(block_channels), pretrained)
        check_groups(block_channels, norm_groups, "autoencoder")
        flags = checked_flags(attention_levels, block_channels)
        shape = (block_channels, layers_per_block, norm_groups, flags, mid_attention)
        moments = self.moments_per_channel * latent_channels
        self.encoder = Encoder(in_channels, moments, *shape)
        self.quant_conv = Conv1x1(moments, moments)
        self.post_quant_conv = Conv1x1(latent_channels, latent_channels)
        self.decoder = Decoder(latent_channels, in_channels, *shape)

    def moments(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


class AutoencoderKL(GroupNormAutoencoder):
    """Images to a small grid of Gaussians, held near N(0, 1) by a slight KL term, and back."""

    moments_per_channel = 2  # mean and log variance
    regulariser_names = ("kl",)

    def __init__(
        self,
        *,
        in_channels: int = 3,  # of the images
        latent_channels: int = 4,  # of the latents
        block_channels: Sequence[int] = (
            128,
            256,
            512,
            512,
        ),  # width of each level, finest first; each but the last halves
        layers_per_block: int = 2,  # resnets a level in the encoder; one more in the decoder
        norm_groups: int = 32,  # of every GroupNorm
        attention_levels: Sequence[bool] | None = None,  # which levels have attention after each resnet; null: none
        mid_attention: bool = True,  # whether the middle, behind the coarsest level, has attention
        pretrained: str | None = None,  # hub id or folder of published weights, read by the trainer; null: none
    ):
        super().__init__(
            in_channels,
            latent_channels,
            block_channels,
            layers_per_block,
            norm_groups,
            attention_levels,
            mid_attention,
            pretrained,
        )

    def posterior(self, moments: Tensor) -> Posterior:
        return Posterior.from_moments(moments)

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        kl = posterior.kl()
        return kl_weight * kl, {"kl": kl}


class Encoder(nn.Module):
    """Resnets (and attention) and halvings, then the middle, then the moments."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: Sequence[int],
        layers: int,
        groups: int,
        attend: Sequence[bool],  # a flag a level
        mid: bool,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, block_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = block_channels[0]
        for level, channels in enumerate(block_channels):
            last = level == len(block_channels) - 1
            self.down_blocks.append(DownBlock(width, channels, layers, groups, attend[level], halve=not last))
            width = channels
        self.mid_block = MidBlock(width, groups, mid)
        self.conv_norm_out = GroupNormSiLU(groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # (B,3,H,W) -> (B,2C,H/f,W/f)
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """The encoder's mirror image, with one resnet more a level."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: Sequence[int],
        layers: int,
        groups: int,
        attend: Sequence[bool],  # a flag a level
        mid: bool,
    ):
        super().__init__()
        width = block_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid_block = MidBlock(width, groups, mid)
        self.up_blocks = nn.ModuleList()
        for level, channels in reversed(list(enumerate(block_channels))):
            self.up_blocks.append(UpBlock(width, channels, layers + 1, groups, attend[level], double=level > 0))
            width = channels
        self.conv_norm_out = GroupNormSiLU(groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,3,fh,fw)
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class _Level(nn.Module):
    """Resnets of one resolution, each followed by attention if the level has it."""

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, attend: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, channels, layers, groups)
        self.attentions = nn.ModuleList(PixelAttention(channels, groups) for _ in range(layers if attend else 0))

    def layers(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H,W)
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if len(self.attentions) > 0:
                x = self.attentions[i](x)
        return x


class DownBlock(_Level):
    """A level of the encoder; it ends with half the size if it is not the coarsest."""

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, attend: bool, halve: bool):
        super().__init__(in_channels, channels, layers, groups, attend)
        self.downsamplers = nn.ModuleList([DownsampleRightBottom(channels)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H/2,W/2)
        x = self.layers(x)
        for down in self.downsamplers:
            x = down(x)
        return x


class UpBlock(_Level):
    """A level of the decoder; it ends with twice the size if it is not the finest."""

    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, attend: bool, double: bool):
        super().__init__(in_channels, channels, layers, groups, attend)
        self.upsamplers = nn.ModuleList([Upsample(channels)] if double else [])

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',2H,2W)
        x = self.layers(x)
        for up in self.upsamplers:
            x = up(x, 2 * x.shape[-2], 2 * x.shape[-1])
        return x


class MidBlock(nn.Module):
    """Resnet, attention (if any), resnet."""

    def __init__(self, channels: int, groups: int, with_attention: bool):
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if with_attention else [])

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        first, second = self.resnets
        for module in (first, *self.attentions, second):
            x = module(x)
        return x


class PixelAttention(nn.Module):
    """One head as wide as the map; every pixel attends to every other (Rombach et al. 2022, appendix G)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a list of one: published files say to_out.0

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        pixels = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        y = self.to_out(attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)))
        return x + rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[-2])


def _resnets(in_channels: int, channels: int, layers: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else channels, channels, groups, eps=EPS) for i in range(layers)
    )


def _neighbours(size: int, factor: int) -> set[int]:
    """The nearest multiples of the factor below and above, never 0."""
    below = size // factor * factor
    return {below or factor, -(-size // factor) * factor}


def checked_flags(attention_levels: Sequence[bool] | None, block_channels: Sequence[int]) -> list[bool]:
    """One flag a level."""
    flags = list(attention_levels or [False] * len(block_channels))
    if len(flags) != len(block_channels):
        raise ConfigError(
            f"autoencoder.attention_levels has {len(flags)} flags for {len(block_channels)} levels of "
            f"autoencoder.block_channels: give one flag a level, finest first, or null for none."
        )
    return flags
