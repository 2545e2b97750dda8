"""What goes into a network, and what every network refuses before it computes anything.

`forward(x_t, timestep, cond)` gets x_t (B,C,H,W), behind whose channels `cond.concat` stands already; timestep (B,)
float32, larger with more noise: the scheduler's table index, usually 0 to 999 and real, or 1000 t for rectified flow;
and cond (ldm.diffusion.condition.Condition). It gives (B,C',H,W).
`ldm.models.embeddings.TimeEmbedding` is what ours make of the timestep; `check_inputs` and `pooled_of` below are for
forward to call.

A network states what it was built for as attributes: in_channels, out_channels, cross_attention_dim (None: no context),
pooled_dim (None: no vector). What one of yours does not state is not compared with the rest before it runs. With a
method `widened(state)` it takes fewer input channels' weights, so that it can learn to repaint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError


def inpainting_channels(latent_channels: int) -> int:
    """Inputs of a network that repaints: noisy latent, mask, masked latent (Stable Diffusion's 9)."""
    return 2 * latent_channels + 1


def widened(state: dict[str, Tensor], name: str, in_channels: int) -> dict[str, Tensor]:
    """A state whose convolution `name` gets zeros for the input channels that it lacks: the same function at first.

    The same object where it lacks none.
    """
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] >= in_channels:
        return state
    zeros = weight.new_zeros(weight.shape[0], in_channels - weight.shape[1], *weight.shape[2:])
    return {**state, name: torch.cat([weight, zeros], dim=1)}


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
