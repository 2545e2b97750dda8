"""The two-stream transformer of Stable Diffusion 3: picture and caption are both tokens, and attend to each other.

    x_t -> patches + positions -+                              +-> norm_out -> proj_out -> out
                                +-> joint blocks, own weights -+
    context -> context_embedder +   for either stream          +-> (dropped)
    timestep + pooled caption -> modulation of every layer of both streams

Esser et al. 2024, section 4 and figure 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.models.attention import attention
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


class MMDiT(nn.Module):
    """The network: noisy latents, time and condition in; the prediction target's estimate out."""

    def __init__(
        self,
        *,
        in_channels: int = 4,  # of x_t, plus those of cond.concat
        out_channels: int = 4,  # of the latents
        patch_size: int = 2,  # latent pixels a side that make a token
        width: int = 1536,  # of a token, in both streams
        depth: int = 24,  # blocks
        num_heads: int = 24,
        cross_attention_dim: int = 768,  # width of the context, as it comes
        pooled_dim: int | None = None,  # width of cond.pooled; None: the mean of the context over the caption's tokens
        qk_norm: bool = True,  # queries and keys are brought to unit RMS: bfloat16 stays stable (section 5.3.2)
        sample_size: int = 32,  # latent pixels a side in training, where positions count 0, 1, 2, ...; any size runs
        checkpoint: BlockRecompute = "none",  # recomputed in the backward pass: nothing, or whole blocks
    ):
        super().__init__()
        check_sizes(width, num_heads, patch_size, sample_size, checkpoint)
        self.in_channels, self.cross_attention_dim, self.pooled_dim = in_channels, cross_attention_dim, pooled_dim
        self.out_channels, self.patch_size, self.checkpoint = out_channels, patch_size, checkpoint
        self.pos_embed = PatchEmbedding(in_channels, width, patch_size, sample_size)
        self.time_embedding = TimeEmbedding(TIME_WAVES, width)
        self.pooled_embedding = PooledEmbedding(pooled_dim or cross_attention_dim, width)
        self.context_embedder = nn.Linear(cross_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, num_heads, qk_norm, last=i == depth - 1) for i in range(depth)
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        initialise(self, [self.proj_out])

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:  # (B,C,H,W), (B,), cond -> (B,C',H,W)
        """The network's output; any H and W that patches tile, any real timestep."""
        check_inputs("MMDiT", self.in_channels, self.cross_attention_dim, x_t, cond)
        check_patches(self.patch_size, *x_t.shape[-2:])
        assert cond.context is not None
        dtype = self.proj_out.weight.dtype
        vector = self.time_embedding(timestep) + self.pooled_embedding(self._pooled(cond).to(dtype))
        vector = F.silu(vector)  # every modulation begins with this SiLU: once is enough
        tokens, text = self.pos_embed(x_t.to(dtype)), self.context_embedder(cond.context.to(dtype))
        for block in self.transformer_blocks:
            tokens, text = call(block, tokens, text, vector, cond.mask, recompute=self.checkpoint == "blocks")
        out = self.proj_out(modulated(tokens, *self.norm_out(vector)))
        return unpatch(out, self.patch_size, height=x_t.shape[-2] // self.patch_size)

    def widened(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of this network with fewer input channels, with zeros for the others."""
        return widened(state, "pos_embed.proj.weight", self.in_channels)

    def _pooled(self, cond: Condition) -> Tensor:  # -> (B,P)
        return mean_of_tokens(cond) if self.pooled_dim is None else pooled_of("MMDiT", self.pooled_dim, cond)


class JointBlock(Block):
    """Both streams attend to both, then go through their own MLP; the identity at first.

    The last block's text only feeds the picture: it has no weights for an outcome of its own, which would be dropped
    (but for its queries, which published files hold).
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool, last: bool):
        super().__init__()
        self.last = last
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, num_heads, qk_norm, last)
        self.ff = MLP(width)
        self.ff_context = None if last else MLP(width)

    def forward(self, tokens: Tensor, text: Tensor, vector: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        # (B,L,D), (B,S,D), (B,D), (B,S) -> (B,L,D), (B,S,D)
        shift, scale, gate, *rest = self.norm1(vector)
        shift_text, scale_text, *rest_text = self.norm1_context(vector)
        y, y_text = self.attn(modulated(tokens, shift, scale), modulated(text, shift_text, scale_text), mask)
        tokens = _added(tokens, y, self.ff, [gate, *rest])
        return tokens, text if self.ff_context is None else _added(text, y_text, self.ff_context, rest_text)


def _added(x: Tensor, y: Tensor, mlp: MLP, modulation: Sequence[Tensor]) -> Tensor:
    """A stream with its share of the attention and with its MLP."""
    gate, shift, scale, gate_mlp = modulation
    x = x + gate * y
    return x + gate_mlp * mlp(modulated(x, shift, scale))


class JointAttention(nn.Module):
    """One softmax over the tokens of both streams, each with maps of its own."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, last: bool):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))  # a list of one: published files say to_out.0
        self.to_add_out = None if last else nn.Linear(width, width)

        def norm() -> nn.Module:
            return nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()

        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()

    def forward(self, tokens: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        # (B,L,D), (B,S,D), (B,S) -> (B,L,D), (B,S,D)
        q = [self.norm_q(self._heads(self.to_q(tokens))), self.norm_added_q(self._heads(self.add_q_proj(text)))]
        k = [self.norm_k(self._heads(self.to_k(tokens))), self.norm_added_k(self._heads(self.add_k_proj(text)))]
        v = [self._heads(self.to_v(tokens)), self._heads(self.add_v_proj(text))]
        if mask is not None:  # every patch counts
            mask = torch.cat([mask.new_ones(tokens.shape[:2]), mask], dim=1)
        y = rearrange(attention(torch.cat(q, 2), torch.cat(k, 2), torch.cat(v, 2), mask), "b n l d -> b l (n d)")
        y, y_text = y.split([tokens.shape[1], text.shape[1]], dim=1)
        return self.to_out(y), y_text if self.to_add_out is None else self.to_add_out(y_text)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (n d) -> b n l d", n=self.num_heads)


class PooledEmbedding(nn.Module):
    """Two linear layers on a vector that stands for the whole caption."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:  # (B,P) -> (B,D)
        return self.linear_2(F.silu(self.linear_1(pooled)))


def mean_of_tokens(cond: Condition) -> Tensor:  # -> (B,D)
    """The context's mean over the tokens that count."""
    assert cond.context is not None
    if cond.mask is None:
        return cond.context.mean(dim=1)
    weight = cond.mask.to(cond.context.dtype)[..., None]
    return (weight * cond.context).sum(dim=1) / weight.sum(dim=1)
