"""Textual inversion: new words whose vectors alone are learnt (Gal et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.content import Embedding
from ldm.errors import ConfigError
from ldm.text.encoder import CLIPTokenized, TextEncoder


class TextualInversion(Adapter):
    """`placeholder` in a prompt, a negative one too, stands for `num_vectors` learnt rows of the token embedding.

    The text encoder's own rows are not touched. More vectors hold more, and leave the prompt fewer tokens.
    """

    kind = "textual_inversion"
    formats = ("diffusers", "a1111")
    changes_text = True

    def __init__(
        self,
        placeholder: str = "<new>",  # what prompts call it; no ordinary word of the model's
        initial_text: str = "*",  # the vectors begin as its tokens'
        num_vectors: int = 1,
        lr: float | None = None,
        format: str | None = None,
    ):
        super().__init__(lr, format)
        if num_vectors < 1:
            raise ConfigError(f"adapter.textual_inversion.num_vectors={num_vectors}: must be at least 1.")
        self.placeholder, self.initial_text, self.num_vectors = placeholder, initial_text, num_vectors
        self.embedding: nn.Embedding | None = None  # (n, width): optimizers know tables from matrices by this name
        self._text_encoder: list[CLIPTokenized] = []  # in a list: it is no part of this module

    @classmethod
    def of(cls, content: Embedding) -> TextualInversion:
        """The words that a file holds."""
        if content.token is None:
            raise ConfigError("the embedding's file does not say its word: give token=, the word that prompts use.")
        made = cls(content.token, num_vectors=len(content.vectors))
        made.embedding = _table(content.vectors)
        return made

    @property
    def vectors(self) -> Tensor:
        assert self.embedding is not None, "attach it first"
        return self.embedding.weight

    def attach(self, network: nn.Module, text_encoder: TextEncoder) -> None:
        text_encoder = self.readable(text_encoder)
        rows = text_encoder.token_embedding.weight
        if self.embedding is None:
            self.embedding = _table(self._first_vectors(text_encoder).to(rows.device))
        if self.vectors.shape[1] != rows.shape[1]:
            raise ConfigError(
                f"the embedding {self.placeholder} is {self.vectors.shape[1]} numbers wide, this model's words are "
                f"{rows.shape[1]} (Stable Diffusion 1: 768, 2: 1024): load the base that it was trained on."
            )
        if len(self.vectors) > text_encoder.max_tokens:
            raise ConfigError(
                f"the embedding {self.placeholder} has {len(self.vectors)} vectors, and this model's prompts have "
                f"{text_encoder.max_tokens} tokens: it cannot be said."
            )
        text_encoder.add_word(self.placeholder, self.vectors)
        self._text_encoder = [text_encoder]

    def readable(self, text_encoder: TextEncoder) -> CLIPTokenized:
        """The text encoder, if it reads words and the placeholder can be one; what is known without its tokenizer."""
        if not isinstance(text_encoder, CLIPTokenized):
            raise ConfigError(
                f"textual inversion needs a text encoder that reads words, not {type(text_encoder).__name__}."
            )
        text_encoder.check_word(self.placeholder)
        return text_encoder

    def check_state(self, state: Mapping[str, Tensor], where: str) -> None:
        counts = [len(t) if t.ndim == 2 else 0 for t in state.values()]
        if counts != [self.num_vectors]:
            raise ConfigError(f"{where} says num_vectors={self.num_vectors}, and its tensors have {counts[:3]}.")

    def detach(self) -> None:
        for text_encoder in self._text_encoder:
            text_encoder.remove_word(self.placeholder)
        self._text_encoder = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        attached = list(self._text_encoder)
        self.detach()
        try:
            yield
        finally:
            for text_encoder in attached:
                self.attach(nn.Module(), text_encoder)

    def _first_vectors(self, text_encoder: CLIPTokenized) -> Tensor:  # -> (n, width)
        ids = [token.id for token in text_encoder.tokens(self.initial_text)]
        if not ids:
            raise ConfigError(
                f"adapter.textual_inversion.initial_text={self.initial_text!r} has no tokens: give a word or two that "
                "come near, or * for none in particular."
            )
        chosen = [ids[i * len(ids) // self.num_vectors] for i in range(self.num_vectors)]
        return text_encoder.token_embedding.weight.detach()[chosen]

    def content(self) -> Embedding:
        return Embedding(self.placeholder, self.vectors.detach())


def _table(vectors: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(vectors.detach().float(), freeze=False)
