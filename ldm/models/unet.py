"""The U-Net of latent diffusion, in the architecture and with the names of Stable Diffusion 1.x and 2.x.

    x_t -> conv_in -> down_blocks (keeping skips) -> mid_block -> up_blocks (using them up) -> conv_out -> out
    timestep -> time_embedding -> every resnet;  context -> every transformer's cross-attention

Ho et al. 2020 for the shape, Rombach et al. 2022 (section 3.3) for cross-attention. State-dict keys are diffusers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.models.attention import GEGLU, SpatialTransformer
from ldm.models.embeddings import TimeEmbedding
from ldm.models.inputs import check_inputs, widened
from ldm.models.recompute import Recompute, call
from ldm.models.resnet import Downsample, GroupNormSiLU, ResnetBlock, Upsample


class UNet(nn.Module):
    """The network: noisy latents, time and condition in; the prediction target's estimate out."""

    def __init__(
        self,
        *,
        in_channels: int = 4,  # of x_t, plus those of cond.concat (inpainting: 9)
        out_channels: int = 4,  # of the latents
        block_channels: Sequence[int] = (320, 640, 1280, 1280),  # width of each level, finest first
        layers_per_block: int = 2,  # resnets a level on the way down; one more on the way up
        attention_levels: Sequence[bool] = (True, True, True, False),  # which levels have transformers
        mid_attention: bool = True,  # whether the middle has one (without: one resnet there instead of two)
        cross_attention_dim: int | None = 768,  # width of the context; None: no cross-attention
        head_dim: int | None = None,  # width of an attention head (SD 2: 64) ...
        num_heads: int | None = 8,  # ... or heads at every level (SD 1: 8); one of the two
        transformer_depth: int = 1,  # attention blocks in a transformer
        linear_projection: bool = False,  # transformers' projections stored as linear maps (SD 2), not 1x1 convolutions
        norm_groups: int = 32,  # of every GroupNorm
        checkpoint: Recompute = "none",  # recomputed in the backward pass: nothing, norms with SiLU, or whole blocks
    ):
        super().__init__()
        _check_levels(block_channels, attention_levels, norm_groups)
        _check_policy(checkpoint)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.cross_attention_dim, self.pooled_dim = cross_attention_dim, None
        time_width = 4 * block_channels[0]

        def resnet(channels_in: int, channels_out: int) -> ResnetBlock:
            return ResnetBlock(channels_in, channels_out, norm_groups, eps=1e-5, time_width=time_width)

        def transformer(channels: int) -> SpatialTransformer:
            heads = _heads(channels, head_dim, num_heads)
            return SpatialTransformer(
                channels, heads, cross_attention_dim, transformer_depth, linear_projection, norm_groups
            )

        def layers(pairs: _Pairs, with_attention: bool) -> tuple[list[ResnetBlock], list[SpatialTransformer]]:
            transformers = [transformer(channels) for _, channels in pairs] if with_attention else []
            return [resnet(*pair) for pair in pairs], transformers

        down, up = _resnet_widths(block_channels, layers_per_block)
        finest, coarsest = block_channels[0], block_channels[-1]
        self.time_embedding = TimeEmbedding(finest, time_width)
        self.conv_in = nn.Conv2d(in_channels, finest, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(*layers(pairs, attend), Downsample(channels) if level < len(down) - 1 else None)
            for level, (pairs, attend, channels) in enumerate(zip(down, attention_levels, block_channels, strict=True))
        )
        middle = [resnet(coarsest, coarsest) for _ in range(2 if mid_attention else 1)]
        self.mid_block = MidBlock(middle, [transformer(coarsest)] if mid_attention else [])
        self.up_blocks = nn.ModuleList(
            UpBlock(*layers(up[level], attention_levels[level]), Upsample(block_channels[level]) if level > 0 else None)
            for level in reversed(range(len(up)))
        )
        self.conv_norm_out = GroupNormSiLU(norm_groups, finest, eps=1e-5)
        self.conv_out = nn.Conv2d(finest, out_channels, 3, padding=1)
        # The untrained answer is 0, so the first loss is the target's variance. Branches inside are not zeroed: with
        # silent transformers the quickstart still ignored its captions after 1,500 steps, without them not after 100.
        _zero(self.conv_out)
        self._set_recompute(checkpoint)

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:  # (B,C,H,W), (B,), cond -> (B,C',H,W)
        """The network's output; any H and W, any real timestep. `cond.concat` is already part of x_t here."""
        check_inputs("U-Net", self.in_channels, self.cross_attention_dim, x_t, cond)
        dtype = self.conv_in.weight.dtype
        time = F.silu(self.time_embedding(timestep))  # every resnet begins with this SiLU: once is enough
        context = None if cond.context is None else cond.context.to(dtype)
        x = self.conv_in(x_t.to(dtype))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, context, cond.mask, skips)
        x = self.mid_block(x, time, context, cond.mask)
        for block in self.up_blocks:
            x = block(x, time, context, cond.mask, skips)
        return self.conv_out(self.conv_norm_out(x))

    def widened(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of this network with fewer input channels, with zeros for the others."""
        return widened(state, "conv_in.weight", self.in_channels)

    def _set_recompute(self, policy: Recompute) -> None:
        for module in self.modules():
            if isinstance(module, GroupNormSiLU | GEGLU):
                module.recompute = policy == "norms"
            elif isinstance(module, _Level):
                module.recompute = policy == "blocks"


class _Level(nn.Module):
    """Resnets of one resolution, each followed by a transformer if the level has them."""

    recompute = False  # True: only the input of each resnet and transformer is kept for the backward pass

    def __init__(self, resnets: Sequence[ResnetBlock], transformers: Sequence[SpatialTransformer]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers)  # empty on a level without attention

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = call(self.resnets[i], x, time, recompute=self.recompute)
        if i < len(self.attentions):
            x = call(self.attentions[i], x, context, mask, recompute=self.recompute)
        return x


class DownBlock(_Level):
    """One level on the way down; every map it makes is put on the pile of skips."""

    def __init__(
        self, resnets: Sequence[ResnetBlock], transformers: Sequence[SpatialTransformer], down: Downsample | None
    ):
        super().__init__(resnets, transformers)
        self.downsamplers = nn.ModuleList([] if down is None else [down])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None, skips: list[Tensor]
    ) -> Tensor:  # (B,C,H,W), (B,D), (B,S,D'), (B,S) -> (B,C',H/2,W/2)
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context, mask)
            skips.append(x)
        for down in self.downsamplers:
            x = down(x)
            skips.append(x)
        return x


class MidBlock(_Level):
    """The coarsest level's turning point: resnet, transformer, resnet."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        # (B,C,H,W), (B,D), (B,S,D'), (B,S) -> (B,C,H,W)
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context, mask)
        return x


class UpBlock(_Level):
    """One level on the way up; each resnet takes the last skip from the pile beside its input."""

    def __init__(self, resnets: Sequence[ResnetBlock], transformers: Sequence[SpatialTransformer], up: Upsample | None):
        super().__init__(resnets, transformers)
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None, skips: list[Tensor]
    ) -> Tensor:  # (B,C,H,W), (B,D), (B,S,D'), (B,S) -> (B,C',2H,2W)
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), time, context, mask)
        for up in self.upsamplers:
            x = up(x, *skips[-1].shape[-2:])  # the size of the skip that comes next: odd sizes find their way back
        return x


_Pairs = list[tuple[int, int]]  # (in, out) channels of a level's resnets


def _resnet_widths(block_channels: Sequence[int], layers: int) -> tuple[list[_Pairs], list[_Pairs]]:
    """Widths on the way down and on the way up, finest level first in both; upward inputs include their skips."""
    width, skips, last = block_channels[0], [block_channels[0]], len(block_channels) - 1
    down: list[_Pairs] = []
    for level, channels in enumerate(block_channels):
        down.append([(width if i == 0 else channels, channels) for i in range(layers)])
        skips += [channels] * (layers if level == last else layers + 1)  # one for the halved map
        width = channels
    up: list[_Pairs] = []
    for channels in reversed(block_channels):
        up.append([(skips.pop() + (width if i == 0 else channels), channels) for i in range(layers + 1)])
        width = channels
    return down, up[::-1]


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def _heads(channels: int, head_dim: int | None, num_heads: int | None) -> int:
    """How many heads a transformer of this width gets."""
    if (head_dim is None) == (num_heads is None):
        raise ConfigError(
            f"give one of model.head_dim and model.num_heads and set the other to null (they are {head_dim} and "
            f"{num_heads}): head_dim=64 num_heads=null is the faster choice, num_heads=8 head_dim=null is SD 1's."
        )
    divisor, name = (head_dim, "head_dim") if num_heads is None else (num_heads, "num_heads")
    assert divisor is not None
    if channels % divisor:
        fits = ", ".join(str(n) for n in (8, 16, 32, 40, 64) if channels % n == 0)
        raise ConfigError(
            f"a level of {channels} channels does not divide by model.{name}={divisor}: choose one that divides every "
            f"entry of model.block_channels that has attention (here: {fits or 'a multiple of 8 channels first'})."
        )
    return channels // divisor if num_heads is None else num_heads


def _check_levels(block_channels: Sequence[int], attention_levels: Sequence[bool], norm_groups: int) -> None:
    if len(block_channels) != len(attention_levels):
        flags = str((list(attention_levels) + [False] * len(block_channels))[: len(block_channels)])
        raise ConfigError(
            f"model.attention_levels has {len(attention_levels)} flags for {len(block_channels)} levels of "
            f"model.block_channels: one flag a level, as in model.attention_levels={flags.lower().replace(' ', '')}."
        )
    check_groups(block_channels, norm_groups, "model")


def check_groups(block_channels: Sequence[int], norm_groups: int, node: str) -> None:
    """Refuse widths that GroupNorm cannot split."""
    bad = [c for c in block_channels if c % norm_groups]
    if bad:
        fits = next(n for n in (32, 16, 8, 4, 2, 1) if all(c % n == 0 for c in block_channels))
        raise ConfigError(
            f"{node}.block_channels has {bad}, which do not divide into {node}.norm_groups={norm_groups} groups: "
            f"set {node}.norm_groups={fits}, or choose multiples of {norm_groups}."
        )


def _check_policy(policy: str) -> None:
    if policy not in get_args(Recompute):
        raise ConfigError(f"model.checkpoint={policy} is not known: choose one of {', '.join(get_args(Recompute))}.")
