"""No text at all."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.text.encoder import TextEncoder


class NullText(TextEncoder):
    """For unconditional models: whatever the caption, the Condition is empty."""

    context_dim = None
    max_length = 0
    trainable = False

    def tokenize(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), 0, dtype=torch.long)

    def forward(self, ids: Tensor) -> Condition:
        return Condition()

    def save_tokenizer(self, directory: str | Path) -> None:
        pass
