"""What the network is told besides x_t and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of conditions; every field is None or has the batch first.

    context: (B, L, D) token states for cross-attention.
    mask:    (B, L) bool, True where a token counts; None: all count (Stable Diffusion attends to its padding).
    pooled:  (B, D') one vector an image.
    concat:  (B, C', H, W) channels put behind x_t (inpainting: mask and masked latent); never scaled by c_in.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    concat: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """`function` applied to every tensor that is there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{k: None if v is None else function(v) for k, v in values.items()})

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return self.map(lambda v: v[index])

    def to(self, *args, **kwargs) -> Condition:
        return self.map(lambda v: v.to(*args, **kwargs))

    def repeat_interleave(self, n: int) -> Condition:
        """Each condition n times in a row, for several noises or pictures of one caption."""
        return self.map(lambda v: v.repeat_interleave(n, dim=0))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """One batch of several; all must have the same fields."""
        merged = {}
        for f in fields(Condition):
            values = [getattr(c, f.name) for c in conditions]
            if all(v is None for v in values):
                continue
            if any(v is None for v in values):
                raise ValueError(f"conditions cannot be put beside each other: only some of them have '{f.name}'.")
            merged[f.name] = torch.cat(values)
        return Condition(**merged)
