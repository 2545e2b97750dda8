"""A small text encoder that is trained along with the model: CLIP's architecture in any size."""

from __future__ import annotations

from torch import nn

from ldm.text.clip import CLIPText


class SmallTextEncoder(CLIPText):
    """ids (B, L) -> context (B, L, width), from fresh weights and a vocabulary built from the training captions."""

    trainable = True

    def __init__(
        self,
        vocab_size: int,  # rows of the embedding: at least the tokenizer's
        max_length: int,  # tokens of a caption with its two marks; shorter is faster
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        tokenizer: str | None = None,  # folder, read at the first caption
    ):
        super().__init__(vocab_size, max_length, width, layers, heads, tokenizer=tokenizer)
        # CLIP's own embeddings start at 0.02: words then drown in the residual stream before a short training can tell
        # them apart. On the quickstart's shapes the colour words were still ignored after 1,000 steps.
        nn.init.normal_(self.text_model.get_parameter("embeddings.token_embedding.weight"), std=1.0)
