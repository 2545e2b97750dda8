"""What autoencoders share whose codes are points of a grid: no code is learnt, so none can die."""

from __future__ import annotations

from torch import Tensor

from ldm.autoencoders.kl import GroupNormAutoencoder
from ldm.autoencoders.latents import Point, Posterior
from ldm.autoencoders.usage import MOST_CODES, perplexity, shares, use
from ldm.errors import ConfigError


class ImpliedCodebook(GroupNormAutoencoder):
    """`encode` gives z before it is rounded, which diffusion works on; `decode` rounds it first, straight through.

    A kind says how many codes there are (`size`), what they are (`rounded`), and their numbers, both ways.
    """

    moments_per_channel = 1
    size: int

    def take_size(self, size: int, key: str) -> None:
        """Says how many codes there are; where they can be counted, their use is logged. key: what decides it."""
        if size >= 2**63:
            raise ConfigError(
                f"autoencoder.{key} implies {size:.1e} codes, more than an index of 64 bits can tell apart: "
                "give it fewer."
            )
        self.size = size
        if size <= MOST_CODES:
            self.regulariser_names = (*self.regulariser_names, "perplexity", "use")

    def bounded(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,C,h,w)
        """What the encoder's output is before it is rounded."""
        return z

    def rounded(self, z: Tensor) -> Tensor:  # (B,C,h,w), any -> (B,C,h,w)
        """The codes; without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must say what its codes are.")

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w), any -> (B,h,w) int64 in [0, size)
        """The codes' numbers."""
        raise NotImplementedError(f"{type(self).__name__} must number its codes.")

    def codes(self, indices: Tensor) -> Tensor:  # (B,h,w) in [0, size) -> (B,C,h,w)
        """What `indices` numbers."""
        raise NotImplementedError(f"{type(self).__name__} must number its codes.")

    def posterior(self, moments: Tensor) -> Posterior:  # (B,C,h,w), bounded
        return Point(moments)

    def encode(self, images: Tensor) -> Posterior:
        return self.posterior(self.bounded(super().encode(images).mean))

    def quantised(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,C,h,w)
        """The codes, exactly, with z's gradient (van den Oord et al. 2017, section 3.2)."""
        return self.rounded(z) + (z - z.detach())

    def decode(self, z: Tensor) -> Tensor:  # (B,C,h,w) raw, continuous -> (B,3,fh,fw)
        return super().decode(self.quantised(z))

    def usage(self, z: Tensor) -> dict[str, Tensor]:  # (B,C,h,w) -> (B,) each
        """Of the batch, to log; nothing where there are too many codes to count."""
        if self.size > MOST_CODES:
            return {}
        frequencies = shares(self.indices(z), self.size)
        return {"perplexity": perplexity(frequencies).expand(len(z)), "use": use(frequencies).expand(len(z))}
