"""A network that another module uses as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network whose weights are nobody's parameters and in no state dict, and moves it where its holder goes.

    network: put into evaluation mode. None: `hold` gives it later.
    """

    def __init__(self, network: nn.Module | None = None):
        super().__init__()
        self._held: list[nn.Module] = []  # in a list, which nn.Module does not look into
        self._moves: list[Callable[[Tensor], Tensor]] = []  # before there was a network
        if network is not None:
            self.hold(network)

    def hold(self, network: nn.Module) -> None:
        network.eval().requires_grad_(False)
        for move in self._moves:
            network._apply(move)
        self._held[:] = [network]

    @property
    def network(self) -> Any:
        """What is held; None before."""
        return self._held[0] if self._held else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        for network in self._held:
            network._apply(fn, recurse)
        if not self._held:
            self._moves.append(fn)
        return super()._apply(fn, recurse)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._held[0](*inputs, **named)
