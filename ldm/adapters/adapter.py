"""What every adapter is: small trained tensors beside a base that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.adapters.content import Content
from ldm.errors import ConfigError
from ldm.text.encoder import TextEncoder


class Adapter(nn.Module):
    """Attached to a base, it changes what chosen layers read or give; its parameters are all that is trained.

    Layers are changed by hooks, not replaced: the base keeps its weights and their names, so checkpoints, averages,
    exports and merges of it need not know, and adapters combine in any order. (peft replaces layers, which renames the
    base's weights and hides a layer's input from the next adapter.)

    strength: how much of the change applies, 0 none, 1 all of it, as trained.
    lr: the learning rate of its tensors; None: the optimizer's. Methods differ by a factor of 100 in what suits them.
    format: of the file that leaves when training ends, one of `formats`.
    """

    kind: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]  # that its file can have; the first is the usual one
    changes_text: bool = False  # whether what the text encoder gives depends on it

    def __init__(self, lr: float | None = None, format: str | None = None):
        super().__init__()
        if format not in (None, *self.formats):
            raise ConfigError(f"adapter.{self.kind}.format={format}: choose one of {', '.join(self.formats)}.")
        if lr is not None and lr < 0:
            raise ConfigError(f"adapter.{self.kind}.lr={lr}: must be at least 0.")
        self.lr, self.format = lr, format or self.formats[0]
        self.strength = 1.0
        self._handles: list[RemovableHandle] = []

    def attach(self, network: nn.Module, text_encoder: TextEncoder) -> None:
        """Makes its tensors, if it has none yet, from the base's layers and hooks them in; the base is not changed.

        New tensors are such that the base gives what it gave before, bit for bit. ConfigError where it does not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be attached.")

    def check_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """ConfigError, opened by `where`, unless its settings and its tensors in a file are of one size.

        `attach` makes tensors as large as the settings say; those of somebody else may say anything.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be filled.")

    def detach(self) -> None:
        """The base gives again what it gave without it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block it is as if it were not attached."""
        strength, self.strength = self.strength, 0.0
        try:
            yield
        finally:
            self.strength = strength

    def content(self) -> Content:
        """Its tensors as files hold them."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved.")
