"""The vector-quantised autoencoder: images to a small grid of vectors out of a codebook, and back.

van den Oord et al. 2017; Esser et al. 2021 for the networks; Rombach et al. 2022 ("VQ-reg") for where quantisation
stands: in `decode`, so that diffusion works on the continuous z before it. State-dict keys are diffusers' VQModel's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.autoencoders.kl import GroupNormAutoencoder
from ldm.autoencoders.latents import Point, Posterior
from ldm.autoencoders.tally import Step, Tally
from ldm.autoencoders.usage import (
    LARGEST_TABLE,
    check_temperature,
    check_weight,
    entropy_of_nearest,
    perplexity,
    shares,
    use,
)
from ldm.errors import ConfigError

CODES = "quantize.embedding.weight"
LEARNING = ("quantize.cluster_size", "quantize.cluster_sum", "quantize.unused")  # beside them, while they are learnt
SMOOTHING = 1e-5  # Laplace's, of cluster sizes in pixels (Sonnet's VectorQuantizerEMA)


class VQModel(GroupNormAutoencoder):
    """`encode` gives z before quantisation, exactly; `decode` takes any z to its nearest codes first."""

    moments_per_channel = 1
    regulariser_names: tuple[str, ...] = ("quantisation", "perplexity", "use")
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
        codebook_decay: float | None = None,  # of moving averages that the codes then are, 0.99; null: by gradient
        revive_after: int
        | None = None,  # steps without use; then a code is moved onto an encoder's output; null: never
        entropy_weight: float = 0.0,  # of certain pixels and even use of the codes (Yu et al. 2023, eq. 5)
        entropy_temperature: float = 0.01,  # of the softmax over squared distances in it
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
        weights = {"codebook_weight": codebook_weight, "commitment": commitment, "entropy_weight": entropy_weight}
        for name, value in weights.items():
            check_weight(name, value)
        check_temperature(entropy_temperature)
        self.codebook_weight, self.commitment = codebook_weight, commitment
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        if entropy_weight:
            self.regulariser_names = (*self.regulariser_names, "entropy")
        self.quantize = Codebook(codebook_size, latent_channels, codebook_decay, revive_after)

    def posterior(self, moments: Tensor) -> Posterior:
        return Point(moments)

    def decode(self, z: Tensor) -> Tensor:  # (B,C,h,w) raw, continuous -> (B,3,fh,fw)
        codes = self.quantize(self.quantize.nearest(z)).to(z.dtype)
        # Straight through: the values are the codes, the gradient is z's (van den Oord et al. 2017, section 3.2).
        return super().decode(z + (codes - z).detach())

    def regulariser(self, posterior: Posterior, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Codebook and commitment terms (equation 3) and the use of the batch; there is no KL term to weigh.

        The codebook learns from its term alone, at weight 1; commitment keeps the encoder near its codes. (By default
        taming-transformers and diffusers exchange the two weights, a mistake that they keep for old results' sake.)
        A codebook of moving averages has no term: it is counted here, and moves at the end of the step.
        """
        z = posterior.mean
        indices = self.quantize.nearest(z)
        codes = self.quantize(indices)
        commitment = (codes.detach() - z).square().flatten(1).mean(dim=1)
        if self.quantize.decay is None:
            codebook = (codes - z.detach()).square().flatten(1).mean(dim=1)
            loss = codebook + self.commitment * commitment
        else:
            loss = self.commitment * commitment
        frequencies = shares(indices, self.quantize.size)
        watched = {"quantisation": loss, "perplexity": perplexity(frequencies), "use": use(frequencies)}
        total = self.codebook_weight * loss
        if self.entropy_weight:
            pixel, batch = entropy_of_nearest(z, self.quantize.embedding.weight, self.entropy_temperature)
            watched["entropy"] = pixel - batch
            total = total + self.entropy_weight * watched["entropy"]
        if self.training and torch.is_grad_enabled():
            self.quantize.count(z, indices)
        return total, {name: value.expand(len(z)) for name, value in watched.items()}

    def begin_batch(self, positions: range, total: int) -> None:
        self.quantize.tally.begin_batch(positions, total)

    def end_step(self, summed: Callable[[Tensor], None], seed: int, step: int) -> None:
        self.quantize.end_step(summed, seed + step)

    def widened(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of any way of learning, a published file's too, for this one's."""
        return begun(state, self.state_dict())


class Codebook(nn.Module):
    """K vectors; indices (B,h,w) -> vectors (B,C,h,w).

    decay: None: the codes are a parameter. In (0, 1): they are means, of the z nearest to each, over steps past that
        weigh less and less (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019, section 3.1).
    revive_after: steps without use after which a code is moved onto an encoder's output of the step (Dhariwal et al.
        2020; Zeghidour et al. 2021). None: never. Moments that an optimizer has of it stay,
        and averaged weights (ema=) come to it only as they do to all.
    """

    cluster_size: Tensor
    cluster_sum: Tensor
    unused: Tensor

    def __init__(self, size: int, channels: int, decay: float | None = None, revive_after: int | None = None):
        super().__init__()
        if decay is not None and not 0 < decay < 1:
            raise ConfigError(
                f"autoencoder.codebook_decay={decay} is the share of a moving average that stays at a step, between "
                "0 and 1: codebook_decay=0.99, or null to learn the codes by gradient."
            )
        if revive_after is not None and revive_after < 1:
            raise ConfigError(
                f"autoencoder.revive_after={revive_after} counts steps without use, at least 1: revive_after=100, or "
                "null to leave such codes where they are."
            )
        self.size, self.decay, self.revive_after = size, decay, revive_after
        self.embedding = nn.Embedding(size, channels)
        # As wide as a fresh encoder's z. Published codebooks start within 1/size of 0, all in one place, and pictures
        # stay grey until they have spread: after 200 steps on the quickstart's shapes errors of 0.149 against 0.103.
        nn.init.normal_(self.embedding.weight, std=0.3)
        if decay is not None:
            self.embedding.weight.requires_grad_(False)
            # Each code begins as the mean of one pixel: it stays where it is until it is used.
            self.register_buffer("cluster_size", torch.ones(size))
            self.register_buffer("cluster_sum", self.embedding.weight.detach().clone())
        if revive_after is not None:
            self.register_buffer("unused", torch.zeros(size, dtype=torch.int64))  # steps since it was used
        self.tally = Tally()

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
        return perplexity(shares(indices, self.size))

    def count(self, z: Tensor, indices: Tensor) -> None:  # (B,C,h,w), (B,h,w)
        """Keeps a micro-batch for the end of the step."""
        if self.decay is not None or self.revive_after is not None:
            self.tally.add(z, indices)

    @torch.no_grad()
    def end_step(self, summed: Callable[[Tensor], None], seed: int) -> None:
        """Moves the codes as the step says; none where a z of it was no number, but also those of a step that was left
        out for its gradients alone: its z are good.

        summed: adds a tensor of all processes. seed: of the encoder's outputs onto which unused codes are moved.
        """
        candidates = None if self.revive_after is None else seed
        seen = self.tally.close(self.size, summed, self.decay is not None, candidates)
        if seen is None:
            return
        if self.decay is not None:
            self._average(seen, self.decay)
        if self.revive_after is not None:
            self._revive(seen, self.revive_after)

    def _average(self, seen: Step, decay: float) -> None:
        """N <- decay N + (1 - decay) n, m likewise, e = m / N (van den Oord et al. 2017, appendix A.1).

        N is smoothed in e, so that it is not 0 where a code is never used: N' = (N + eps) / (sum N + K eps) sum N.
        """
        assert seen.sums is not None
        _set(self.cluster_size, self.cluster_size.float().lerp(seen.counts, 1 - decay), seen.finite)
        _set(self.cluster_sum, self.cluster_sum.float().lerp(seen.sums, 1 - decay), seen.finite)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + SMOOTHING) / (total + self.size * SMOOTHING) * total
        _set(self.embedding.weight, self.cluster_sum / smoothed[:, None], seen.finite)

    def _revive(self, seen: Step, after: int) -> None:
        """Each code that was unused for so long is one pixel of this step, and as new as a fresh one."""
        assert seen.candidates is not None
        _set(self.unused, (self.unused + 1).where(seen.counts == 0, 0), seen.finite)
        dead = (self.unused >= after) & seen.finite
        _set(self.embedding.weight, seen.candidates, dead[:, None])
        _set(self.unused, torch.zeros_like(self.unused), dead)
        if self.decay is not None:
            _set(self.cluster_size, torch.ones_like(self.cluster_size), dead)
            _set(self.cluster_sum, seen.candidates, dead[:, None])


def begun(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with what `wanted` says that a codebook learns from: begun where it is missing, the rest left out."""
    found = {k: v for k, v in state.items() if k in wanted or k not in LEARNING}
    if CODES in found:
        codes = found[CODES]
        fresh = (torch.ones(len(codes)), codes.float(), torch.zeros(len(codes), dtype=torch.int64))
        found |= {k: v.clone() for k, v in zip(LEARNING, fresh, strict=True) if k in wanted and k not in found}
    return found


def _set(old: Tensor, new: Tensor, where: Tensor) -> None:
    """In place, and without asking the device where."""
    old.copy_(torch.where(where, new.to(old.dtype), old))
