"""Exponential moving averages of the weights that are trained, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.checkpoints.averages import exponent
from ldm.devices import is_shared, laid_out_like, local
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
        self.others: dict[str, dict[str, Tensor]] = {}  # by name, beside the one that is used

    @torch.no_grad()
    def start(self, parameters: dict[str, nn.Parameter]) -> None:
        """Begins from the weights as they are; shadows that a checkpoint has filled are moved beside them.

        Also into their memory layout: convolutions round differently in another, and a resumed run must not.
        """

        def beside(known: dict[str, Tensor]) -> dict[str, Tensor]:
            source = known if known.keys() == parameters.keys() else parameters
            return {k: laid_out_like(source[k].detach(), p.detach()) for k, p in parameters.items()}

        self.shadow = beside(self.shadow)
        self.others = {name: beside(shadow) for name, shadow in self.others.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        self.updates += 1
        weights = [local(parameters[k].detach()) for k in self.shadow]
        for decay, shadow in zip(self.decays(), self.shadows, strict=True):
            torch._foreach_lerp_([local(average) for average in shadow.values()], weights, 1 - decay)

    def decays(self) -> list[float]:
        """How much of each average stays at this update, the first of which is 1."""
        return [min(self.decay, (1 + self.updates) / (10 + self.updates))]

    @property
    def shadows(self) -> list[dict[str, Tensor]]:
        """All averages, the one that is used first."""
        return [self.shadow, *self.others.values()]

    @contextmanager
    def swapped(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the parameters are the averages; left in any way, they are the trained ones again."""
        if not self.shadow:  # before training has begun
            yield
            return
        try:
            self._exchange(parameters)
            yield
        finally:
            self._exchange(parameters)

    @torch.no_grad()
    def _exchange(self, parameters: dict[str, nn.Parameter]) -> None:
        """Weights become averages and averages weights. Shares stay where they are, for FSDP knows them by place."""
        for name, p in parameters.items():
            average = self.shadow[name]
            if is_shared(p):
                kept = local(p).clone()
                local(p).copy_(local(average))
                local(average).copy_(kept)
            else:
                self.shadow[name], p.data = p.data, average

    def state(self) -> dict[str, Tensor]:
        return {k: v.detach() for k, v in self.shadow.items()}

    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        self.shadow, self.updates = dict(shadow), updates  # `start` copies them

    def more_state(self) -> dict[str, dict[str, Tensor]]:
        """Averages beside the one that is used."""
        return {name: {k: v.detach() for k, v in shadow.items()} for name, shadow in self.others.items()}

    def load_more(self, others: dict[str, dict[str, Tensor]]) -> None:
        """What `more_state` gave."""
        self.others = {name: dict(others.get(name, {})) for name in self.others}


class PowerEMA(EMA):
    """Averages that weigh the weight after step tau of t by tau^gamma (Karras et al. 2024, Equations 1 to 3).

    Their lengths are relative: a run twice as long is averaged over twice as many steps. Snapshots of them give the
    average of any other length afterwards (task=ema).
    lengths: sigma_rel of each; the first is what validation, pictures and checkpoints use.
    """

    def __init__(self, lengths: Sequence[float] = (0.05, 0.1)):
        super().__init__(decay=0.0)
        if len(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ConfigError(f"ema.lengths={list(lengths)}: one or more different ones, [0.05, 0.1] are usual.")
        self.lengths, self.exponents = list(lengths), [exponent(length) for length in lengths]
        self.others = {f"{length}": {} for length in self.lengths[1:]}

    def decays(self) -> list[float]:
        return [(1 - 1 / self.updates) ** (gamma + 1) for gamma in self.exponents]
