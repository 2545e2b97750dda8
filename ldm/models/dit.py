"""The diffusion transformer: a plain transformer over patches of the latents, told the time by adaLN-Zero.

    x_t -> patches + positions -> transformer_blocks -> norm_out -> proj_out -> out
    timestep (+ pooled vector, a class or a caption) -> modulation of every layer;  context -> cross-attention

Peebles and Xie 2023. Cross-attention to a caption stands between self-attention and MLP as in PixArt-alpha (Chen et al.
2024), its last map 0 at first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.models.attention import Attention
from ldm.models.block import Block
from ldm.models.embeddings import TimeEmbedding
from ldm.models.inputs import check_inputs, pooled_of, widened
from ldm.models.recompute import BlockRecompute, call
from ldm.models.transformer import (
    MLP,
    TIME_WAVES,
    Modulation,
    PatchEmbedding,
    check_patches,
    check_sizes,
    initialise,
    modulated,
    unpatch,
)


class DiT(nn.Module):
    """The network: noisy latents, time and condition in; the prediction target's estimate out."""

    def __init__(
        self,
        *,
        in_channels: int = 4,  # of x_t, plus those of cond.concat
        out_channels: int = 4,  # of the latents
        patch_size: int = 2,  # latent pixels a side that make a token
        width: int = 1152,  # of a token
        depth: int = 28,  # blocks
        num_heads: int = 16,
        cross_attention_dim: int | None = 768,  # width of the context; None: no cross-attention
        pooled_dim: int | None = None,  # width of cond.pooled, added to the time; None: it is not used
        sample_size: int = 32,  # latent pixels a side in training, where positions count 0, 1, 2, ...; any size runs
        checkpoint: BlockRecompute = "none",  # recomputed in the backward pass: nothing, or whole blocks
    ):
        super().__init__()
        check_sizes(width, num_heads, patch_size, sample_size, checkpoint)
        self.in_channels, self.cross_attention_dim, self.pooled_dim = in_channels, cross_attention_dim, pooled_dim
        self.out_channels, self.patch_size, self.checkpoint = out_channels, patch_size, checkpoint
        self.pos_embed = PatchEmbedding(in_channels, width, patch_size, sample_size)
        self.time_embedding = TimeEmbedding(TIME_WAVES, width)
        self.pooled_embedding = None if pooled_dim is None else nn.Linear(pooled_dim, width)
        blocks = [DiTBlock(width, num_heads, cross_attention_dim) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        crossings = [block.attn2.to_out for block in blocks if block.attn2 is not None]
        initialise(self, [self.proj_out, *crossings])

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:  # (B,C,H,W), (B,), cond -> (B,C',H,W)
        """The network's output; any H and W that patches tile, any real timestep."""
        check_inputs("DiT", self.in_channels, self.cross_attention_dim, x_t, cond)
        check_patches(self.patch_size, *x_t.shape[-2:])
        dtype = self.proj_out.weight.dtype
        context = None if cond.context is None else cond.context.to(dtype)
        vector = F.silu(self._vector(timestep, cond))  # every modulation begins with this SiLU: once is enough
        tokens = self.pos_embed(x_t.to(dtype))
        for block in self.transformer_blocks:
            tokens = call(block, tokens, vector, context, cond.mask, recompute=self.checkpoint == "blocks")
        out = self.proj_out(modulated(tokens, *self.norm_out(vector)))
        return unpatch(out, self.patch_size, height=x_t.shape[-2] // self.patch_size)

    def widened(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of this network with fewer input channels, with zeros for the others."""
        return widened(state, "pos_embed.proj.weight", self.in_channels)

    def _vector(self, timestep: Tensor, cond: Condition) -> Tensor:  # -> (B,D)
        vector = self.time_embedding(timestep)
        if self.pooled_embedding is None or self.pooled_dim is None:
            return vector
        return vector + self.pooled_embedding(pooled_of("DiT", self.pooled_dim, cond).to(vector.dtype))


class DiTBlock(Block):
    """Self-attention, cross-attention (if there is a context) and MLP, each added; the identity at first."""

    def __init__(self, width: int, num_heads: int, context_width: int | None):
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.attn1 = Attention(width, num_heads, bias=True)
        self.norm2 = None if context_width is None else nn.LayerNorm(width, eps=1e-6)
        self.attn2 = None if context_width is None else Attention(width, num_heads, context_width, bias=True)
        self.ff = MLP(width)

    def forward(self, tokens: Tensor, vector: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        # (B,L,D), (B,D), (B,S,D'), (B,S) -> (B,L,D)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(vector)
        tokens = tokens + gate * self.attn1(modulated(tokens, shift, scale))
        if self.norm2 is not None and self.attn2 is not None:
            tokens = tokens + self.attn2(self.norm2(tokens), context, mask)
        return tokens + gate_mlp * self.ff(modulated(tokens, shift_mlp, scale_mlp))
