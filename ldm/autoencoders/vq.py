"""The vector-quantised autoencoder: images to a small grid of vectors out of a codebook, and back.

van den Oord et al. 2017; Esser et al. 2021 for the networks; Rombach et al. 2022 ("VQ-reg") for where quantisation
stands: in `decode`, so that diffusion works on the continuous z before it. State-dict keys are diffusers' VQModel's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.autoencoders.kl import GroupNormAutoencoder
from ldm.autoencoders.latents import Point, Posterior
from ldm.errors import ConfigError

LARGEST_TABLE = 2**24  # distances computed at once, pixels times codes: 64 MiB whatever the image


class VQModel(GroupNormAutoencoder):
    """`encode` gives z before quantisation, exactly; `decode` takes any z to its nearest codes first."""

    moments_per_channel = 1
    regulariser_names = ("quantisation", "perplexity")
    one_scale = True  # the nearest code stays the nearest: the standardised codebook is (e - mean) / scale

    def __init__(
        self,
        *,
        in_channels: int = 3,  # of the images
        latent_channels: int = 3,  # of the latents and the codes
        codebook_size: int = 8192,  # codes
        block_channels: Sequence[int] = (128, 256, 512),  # width of each level, finest first; each but the last halves
        layers_per_block: int = 2,  # resnets a level in the encoder; one more in the decoder
        norm_groups: int = 32,  # of every GroupNorm
        attention_levels: Sequence[bool] | None = None,  # which levels have attention after each resnet; null: none
        mid_attention: bool = True,  # whether the middle, behind the coarsest level, has attention
        codebook_weight: float = 1.0,  # of the codebook and commitment terms beside the reconstruction error
        commitment: float = 0.25,  # of the commitment term in them (van den Oord et al.: beta)
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
        if codebook_size < 2:
            raise ConfigError(f"autoencoder.codebook_size={codebook_size} must be at least 2; published: 256 to 16384.")
        self.codebook_weight, self.commitment = codebook_weight, commitment
        self.quantize = Codebook(codebook_size, latent_channels)

    def posterior(self, moments: Tensor) -> Posterior:
        return Point(moments)

    def decode(self, z: Tensor) -> Tensor:  # (B,C,h,w) raw, continuous -> (B,3,fh,fw)
        codes = self.quantize(self.quantize.nearest(z)).to(z.dtype)
        # Straight through: the values are the codes, the gradient is z's (van den Oord et al. 2017, section 3.2).
        return super().decode(z + (codes - z).detach())

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Codebook and commitment terms (equation 3) and the perplexity of the batch; there is no KL term to weigh.

        The codebook learns from its term alone, at weight 1; commitment keeps the encoder near its codes. (By default
        taming-transformers and diffusers exchange the two weights, a mistake that they keep for old results' sake.)
        """
        z = posterior.mean
        indices = self.quantize.nearest(z)
        codes = self.quantize(indices)
        codebook = (codes - z.detach()).square().flatten(1).mean(dim=1)
        commitment = (codes.detach() - z).square().flatten(1).mean(dim=1)
        loss = codebook + self.commitment * commitment
        perplexity = self.quantize.perplexity(indices).expand(len(z))
        return self.codebook_weight * loss, {"quantisation": loss, "perplexity": perplexity}


class Codebook(nn.Module):
    """K vectors; indices (B,h,w) -> vectors (B,C,h,w)."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        # As wide as a fresh encoder's z. Published codebooks start within 1/size of 0, all in one place, and pictures
        # stay grey until they have spread: after 200 steps on the quickstart's shapes errors of 0.149 against 0.103.
        nn.init.normal_(self.embedding.weight, std=0.3)

    def forward(self, indices: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w)
        return rearrange(self.embedding(indices), "b h w c -> b c h w")

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w)
        """The index of the nearest code of each pixel, in float32: bfloat16 cannot tell neighbouring codes apart."""
        codes = self.embedding.weight.float()
        pixels = rearrange(z.float(), "b c h w -> (b h w) c")
        slices = pixels.split(max(1, LARGEST_TABLE // len(codes)))
        # cdist, because autocast leaves it in float32.
        indices = torch.cat([torch.cdist(some, codes).argmin(dim=1) for some in slices])
        return rearrange(indices, "(b h w) -> b h w", h=z.shape[-2], w=z.shape[-1])

    def perplexity(self, indices: Tensor) -> Tensor:  # (B,h,w) -> ()
        """exp of the entropy of the codes' frequencies: how many codes are in use, were they used equally."""
        codes = indices.flatten()
        counts = torch.zeros(self.embedding.num_embeddings, device=codes.device)  # bincount asks a GPU for one
        shares = counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype)) / codes.numel()
        return torch.special.entr(shares).sum().exp()
