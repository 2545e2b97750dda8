"""Learning-rate factors as functions of the optimizer step."""

from __future__ import annotations

import math


def constant(step: int, warmup_steps: int = 0) -> float:
    """Linear warm-up to 1, then 1: a larger max_steps continues the same curve."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, warmup_steps: int = 0, decay_steps: int = 1000, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 to `final` at `decay_steps` (Loshchilov and Hutter 2017)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
