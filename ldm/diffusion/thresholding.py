"""Limits on the jump to x0, for models of pixels or latents that know their range."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clip(x0: Tensor, limit: float = 1.0) -> Tensor:
    """Every value into [-limit, limit] (Ho et al. 2020)."""
    return x0.clamp(-limit, limit)


def dynamic(x0: Tensor, quantile: float = 0.995, largest: float = math.inf) -> Tensor:
    """Each picture clipped at s and divided by it, s its `quantile` of |x0| within [1, largest].

    Saharia et al. 2022, Section 2.3, which sets no `largest`; diffusers' default of 1 makes it plain clipping.
    """
    s = torch.quantile(x0.flatten(1).abs().float(), quantile, dim=1).clamp(1.0, largest).to(x0)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s
