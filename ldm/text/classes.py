"""Class names as captions: a table with one learnt vector a class, and one for the empty caption."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.text.encoder import TextEncoder


class ClassTable(TextEncoder):
    """captions that are class names -> ids (B, 1) -> pooled (B, width) (Peebles and Xie 2023; Ho and Salimans 2022).

    The empty caption, which caption dropout and guidance use, is the class after the last.
    """

    context_dim = None
    max_length = 1
    trainable = True

    def __init__(
        self,
        classes: Sequence[str] | None = None,  # names; null: the captions of the training data, found by the trainer
        width: int = 128,  # of a class' vector: model.pooled_dim
    ):
        super().__init__()
        self.pooled_dim = width
        self.classes = list(classes or [])
        if len(set(self.classes)) != len(self.classes) or "" in self.classes:
            raise ConfigError("text_encoder.classes must be names, each once and none empty: the empty one is added.")
        self.embedding = nn.Embedding(len(self.classes) + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def tokenize(self, captions: list[str]) -> Tensor:
        known = {name: i for i, name in enumerate([*self.classes, ""])}
        for caption in captions:
            if caption not in known:
                near = difflib.get_close_matches(caption, self.classes, n=1)
                raise ConfigError(
                    f"'{caption}' is none of this model's {len(self.classes)} classes."
                    + (f" Did you mean '{near[0]}'?" if near else f" Some of them: {', '.join(self.classes[:8])}.")
                )
        return torch.tensor([[known[caption]] for caption in captions], dtype=torch.long).reshape(len(captions), 1)

    def forward(self, ids: Tensor) -> Condition:
        return Condition(pooled=self.embedding(ids[:, 0]))

    def save_tokenizer(self, directory: str | Path) -> None:
        """Nothing: the names stand in the configuration."""
