"""Finite scalar quantisation: each channel of a latent is rounded to a few levels (Mentzer et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.autoencoders.implied import ImpliedCodebook
from ldm.autoencoders.latents import Posterior
from ldm.errors import ConfigError

MARGIN = 1e-3  # by which the bound stays within the outermost levels


class FSQModel(ImpliedCodebook):
    """z lies in [-1, 1], L levels a channel, 2/L apart (of odd L 2/(L - 1)); there is no loss beside the pictures'."""

    regulariser_names: tuple[str, ...] = ()
    levels: Tensor  # (C,1,1), as all of these
    middle: Tensor  # of the digits: that of 0
    reach: Tensor
    offset: Tensor
    shift: Tensor
    radix: Tensor

    def __init__(
        self,
        *,
        in_channels: int = 3,  # of the images
        levels: Sequence[int] = (8, 5, 5, 5),  # of each channel; as many codes as their product
        latent_channels: int | None = None,  # of the latents; null: as many as there are levels
        block_channels: Sequence[int] = (128, 256, 512),  # width of each level, finest first; each but the last halves
        layers_per_block: int = 2,  # resnets a level in the encoder; one more in the decoder
        norm_groups: int = 32,  # of every GroupNorm
        attention_levels: Sequence[bool] | None = None,  # which levels have attention after each resnet; null: none
        mid_attention: bool = True,  # whether the middle, behind the coarsest level, has attention
        pretrained: str | None = None,  # hub id or folder of published weights, read by the trainer; null: none
    ):
        _check_levels(levels, latent_channels)
        super().__init__(
            in_channels,
            len(levels),
            block_channels,
            layers_per_block,
            norm_groups,
            attention_levels,
            mid_attention,
            pretrained,
        )
        self.take_size(math.prod(levels), "levels")
        steps = torch.tensor(list(levels))
        # Of even L the levels are -L/2 ... L/2 - 1: rounded is z (L - 1)/2 - 1/2, and tan moves its 0 near z = 0.
        reach = (steps - 1) * (1 - MARGIN) / 2
        offset = torch.where(steps % 2 == 0, 0.5, 0.0)
        radix = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        parts = {"levels": steps, "middle": steps // 2, "reach": reach, "offset": offset, "radix": radix}
        for name, values in {**parts, "shift": (offset / reach).tan()}.items():
            self.register_buffer(name, values[:, None, None], persistent=False)

    def bounded(self, z: Tensor) -> Tensor:  # (B,C,h,w), any -> (B,C,h,w) in (-1, 1)
        """f(z) of section 3.1, as in appendix A.1's listing, in units of half the levels."""
        return ((z + self.shift).tanh() * self.reach - self.offset) / self.middle

    def rounded(self, z: Tensor) -> Tensor:  # (B,C,h,w), any -> (B,C,h,w)
        return (self._digits(z) - self.middle).to(z.dtype) / self.middle

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w) int64
        """The first channel counts ones, the next its levels, and so on."""
        return (self._digits(z) * self.radix).sum(dim=1)

    def codes(self, indices: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w) in [-1, 1]
        digits = indices[:, None] // self.radix % self.levels
        return (digits - self.middle) / self.middle

    def _digits(self, z: Tensor) -> Tensor:  # (B,C,h,w), any -> (B,C,h,w) int64 in [0, L)
        steps = (z.detach().float() * self.middle).round().long() + self.middle
        return steps.clamp(min=torch.zeros_like(self.levels), max=self.levels - 1)

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing: the grid is bounded, and holds the latents by itself. Logged is the use of the batch."""
        z = posterior.mean
        return z.new_zeros(len(z)), self.usage(z)


def _check_levels(levels: Sequence[int], latent_channels: int | None) -> None:
    if not levels or min(levels) < 2:
        raise ConfigError(
            f"autoencoder.levels={list(levels)} must name at least 2 levels of each channel, of at least one: "
            "levels=[8,5,5,5]."
        )
    if latent_channels not in (None, len(levels)):
        raise ConfigError(
            f"autoencoder.latent_channels={latent_channels}, but autoencoder.levels={list(levels)} are of "
            f"{len(levels)} channels: leave latent_channels out, or give as many levels."
        )
