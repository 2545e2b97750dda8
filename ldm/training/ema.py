"""Exponential moving averages of the weights that are trained, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError


class EMA:
    """shadow <- shadow + (1 - decay)(weight - shadow) once every optimizer step.

    decay: the final decay; it warms up as min(decay, (1 + n)/(10 + n)), so that early weights are soon forgotten.
    """

    def __init__(self, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay={decay} must lie in [0, 1): for example 0.999 for short runs.")
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, parameters: dict[str, nn.Parameter]) -> None:
        """Begins from the weights as they are; shadows that a checkpoint has filled are moved beside them.

        Also into their memory layout: convolutions round differently in another, and a resumed run must not.
        """
        if self.shadow.keys() == parameters.keys():
            self.shadow = {k: torch.empty_like(p).copy_(self.shadow[k]) for k, p in parameters.items()}
        else:
            self.shadow = {k: p.detach().clone() for k, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[k].detach() for k in self.shadow], 1 - decay)

    @contextmanager
    def swapped(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the parameters are the averages; left in any way, they are the trained ones again."""
        if not self.shadow:  # before training has begun
            yield
            return
        trained = {k: p.data for k, p in parameters.items()}
        try:
            for k, p in parameters.items():
                p.data = self.shadow[k]
            yield
        finally:
            for k, p in parameters.items():
                p.data = trained[k]

    def state(self) -> dict[str, Tensor]:
        return {k: v.detach() for k, v in self.shadow.items()}

    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        self.shadow, self.updates = {k: v.clone() for k, v in shadow.items()}, updates
