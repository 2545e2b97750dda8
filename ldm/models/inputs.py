"""What goes into a network, and what every network refuses before it computes anything."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError


def inpainting_channels(latent_channels: int) -> int:
    """Inputs of a network that repaints: noisy latent, mask, masked latent (Stable Diffusion's 9)."""
    return 2 * latent_channels + 1


def check_inputs(network: str, in_channels: int, cross_attention_dim: int | None, x_t: Tensor, cond: Condition) -> None:
    """Raises ConfigError where latents or context have another width than the network was built for."""
    if x_t.shape[1] != in_channels:
        raise ConfigError(
            f"the {network} was built for {in_channels} input channels and was given {x_t.shape[1]} (latents and, "
            f"for inpainting, mask and masked latents): set model.in_channels={x_t.shape[1]}."
        )
    width = None if cond.context is None else cond.context.shape[-1]
    if width != cross_attention_dim:
        wish = "null" if width is None else width
        raise ConfigError(
            f"the {network}'s cross-attention expects text states of width {cross_attention_dim} and was given "
            f"{width} (None: no text at all): set model.cross_attention_dim={wish} or choose another text_encoder."
        )


def pooled_of(network: str, pooled_dim: int, cond: Condition) -> Tensor:  # -> (B,P)
    """The condition's pooled vector; ConfigError where it is missing or of another width."""
    given = None if cond.pooled is None else cond.pooled.shape[-1]
    if cond.pooled is None or given != pooled_dim:
        raise ConfigError(
            f"the {network} expects pooled vectors of width {pooled_dim} and was given {given} (None: no vector at "
            f"all): set model.pooled_dim={given or 'null'} or choose another text_encoder."
        )
    return cond.pooled
