"""Lookup-free quantisation: each channel of a latent becomes its sign (Yu et al. 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.autoencoders.implied import ImpliedCodebook
from ldm.autoencoders.latents import Posterior
from ldm.autoencoders.usage import check_temperature, check_weight, entropy_of_signs
from ldm.errors import ConfigError


class LFQModel(ImpliedCodebook):
    """2^C codes, the vectors of -1 and 1; entropy and commitment hold z near them, and all of them in use."""

    regulariser_names: tuple[str, ...] = ("commitment", "entropy")
    radix: Tensor

    def __init__(
        self,
        *,
        in_channels: int = 3,  # of the images
        latent_channels: int = 14,  # of the latents, a bit each
        block_channels: Sequence[int] = (128, 256, 512),  # width of each level, finest first; each but the last halves
        layers_per_block: int = 2,  # resnets a level in the encoder; one more in the decoder
        norm_groups: int = 32,  # of every GroupNorm
        attention_levels: Sequence[bool] | None = None,  # which levels have attention after each resnet; null: none
        mid_attention: bool = True,  # whether the middle, behind the coarsest level, has attention
        commitment: float = 0.25,  # weight of the squared distance of z from its signs
        entropy_weight: float = 0.1,  # of certain pixels and even use of the codes (eq. 5)
        entropy_temperature: float = 1.0,  # of the softmax over squared distances in it
        pretrained: str | None = None,  # hub id or folder of published weights, read by the trainer; null: none
    ):
        if latent_channels < 1:
            raise ConfigError(
                f"autoencoder.latent_channels={latent_channels} are the bits of a code, at least 1: latent_channels=14."
            )
        check_weight("commitment", commitment)
        check_weight("entropy_weight", entropy_weight)
        check_temperature(entropy_temperature)
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
        self.take_size(2**latent_channels, "latent_channels")
        self.commitment, self.entropy_weight, self.entropy_temperature = commitment, entropy_weight, entropy_temperature
        self.register_buffer("radix", (2 ** torch.arange(latent_channels))[:, None, None], persistent=False)

    def rounded(self, z: Tensor) -> Tensor:  # (B,C,h,w), any -> (B,C,h,w) of -1 and 1
        """sign(z) = 1 where z > 0, else -1."""
        return torch.where(z.detach() > 0, 1.0, -1.0).to(z.dtype)

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w) int64
        """The sum of 2^i of the channels i that are above 0."""
        return ((z.detach() > 0) * self.radix).sum(dim=1)

    def codes(self, indices: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w)
        return (indices[:, None] // self.radix % 2) * 2.0 - 1.0

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Commitment, and E H(q(z)) - H(E q(z)) over the pixels of the batch (eq. 5)."""
        z = posterior.mean
        commitment = (z - self.rounded(z)).square().flatten(1).mean(dim=1)
        pixel, batch = entropy_of_signs(z, self.entropy_temperature)
        entropy = pixel - batch
        loss = self.commitment * commitment + self.entropy_weight * entropy
        return loss, {"commitment": commitment, "entropy": entropy, **self.usage(z)}
