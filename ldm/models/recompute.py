"""Trading time for memory: activations kept for the backward pass, or computed again during it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "norms", "blocks"]
BlockRecompute = Literal["none", "blocks"]  # of transformers, whose norms have no activation worth recomputing
T = TypeVar("T")


def call(function: Callable[..., T], *args: Tensor | None, recompute: bool) -> T:
    """`function(*args)`, keeping only `args` for the backward pass if `recompute`.

    The non-reentrant kind remembers autocast and the random state, so bfloat16 and dropout give the same numbers twice.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
