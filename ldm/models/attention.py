"""Attention: one function that knows the kernels, and the transformer that U-Nets put on their feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.block import Block
from ldm.models.recompute import call
from ldm.models.resnet import Conv1x1

LONGEST_SCORES = 1024 * 1024  # beyond this many scores a head, softmax attention's L x L matrix costs too much memory


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B,N,L,D), (B,N,S,D), (B,N,S,D), (B,S) bool -> (B,N,L,D); masked-out tokens weigh 0.

    On the CPU the fused kernel's bfloat16 backward pass is slower than the textbook formula; everywhere else it wins.
    """
    keep = None if mask is None else rearrange(mask, "b s -> b 1 1 s")
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and half and q.shape[-2] * k.shape[-2] <= LONGEST_SCORES:
        return softmax_attention(q, k, v, keep)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """The textbook formula (Vaswani et al. 2017, equation 1)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context."""

    def __init__(self, channels: int, num_heads: int, context_width: int | None = None, bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        width = channels if context_width is None else context_width
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(width, channels, bias=bias)
        self.to_v = nn.Linear(width, channels, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a list of one: published files say to_out.0

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        # (B,L,C), (B,S,D), (B,S) -> (B,L,C)
        source = tokens if context is None else context
        q, k, v = (self._heads(x) for x in (self.to_q(tokens), self.to_k(source), self.to_v(source)))
        return self.to_out(rearrange(attention(q, k, v, mask), "b n l d -> b l (n d)"))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (n d) -> b n l d", n=self.num_heads)


class GEGLU(nn.Module):
    """x * GELU(gate), both from one linear map (Shazeer 2020, equation 6)."""

    recompute = False  # True: GELU(gate) is not kept for the backward pass

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:  # (B,L,C) -> (B,L,C')
        return call(_gated, self.proj(x), recompute=self.recompute)


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Four times wider, gated, and back."""

    def __init__(self, channels: int):
        super().__init__()
        # The middle slot is a dropout in published models: it holds no weights but counts in the names.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:  # (B,L,C) -> (B,L,C)
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention (if there is a context) and a feed-forward network, each added to its input."""

    def __init__(self, channels: int, num_heads: int, context_width: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads)
        self.norm2 = None if context_width is None else nn.LayerNorm(channels)
        self.attn2 = None if context_width is None else Attention(channels, num_heads, context_width)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        # (B,L,C), (B,S,D), (B,S) -> (B,L,C)
        tokens = tokens + self.attn1(self.norm1(tokens))
        if self.norm2 is not None and self.attn2 is not None:
            tokens = tokens + self.attn2(self.norm2(tokens), context, mask)
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(Block):
    """A transformer whose tokens are the pixels of a feature map (Rombach et al. 2022, section 3.3)."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        context_width: int | None,  # None: no cross-attention
        depth: int,  # transformer blocks
        linear_projection: bool,  # weights of the two projections: (C, C) as in SD 2, or (C, C, 1, 1) as in SD 1
        norm_groups: int,
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        projection = nn.Linear if linear_projection else Conv1x1
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_width) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        # (B,C,H,W), (B,S,D), (B,S) -> (B,C,H,W)
        tokens = self._into_tokens(self.norm(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        return x + self._out_of_tokens(tokens, height=x.shape[-2])

    # The same numbers either way, but each projection is given its own kind's shape, as adapters on it expect.

    def _into_tokens(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,L,C)
        if self.linear_projection:
            return self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(self.proj_in(x), "b c h w -> b (h w) c")

    def _out_of_tokens(self, tokens: Tensor, height: int) -> Tensor:  # (B,L,C) -> (B,C,H,W)
        if self.linear_projection:
            return rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height)
        return self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))
