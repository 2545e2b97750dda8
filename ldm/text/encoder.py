"""What every text encoder is to the rest: captions in, a `Condition` out, in two steps so that ids can be cached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ldm.devices import on_device
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError

if TYPE_CHECKING:  # transformers takes seconds to import, and an unconditional model has no need of it
    from transformers import CLIPTokenizer


class Token(NamedTuple):
    """A token of a text and the characters it stands for, text[start:end]; a character may have several tokens."""

    id: int
    start: int
    end: int


class TextEncoder(nn.Module):
    """captions (B strings) -> ids (B, L) -> Condition with context (B, L, context_dim) or pooled (B, pooled_dim).

    The constructor reads no file: weights come by `load_state_dict`, words by `load_tokenizer` or `set_tokenizer`.
    """

    context_dim: int | None  # D of the context; None: there is none, and models have no cross-attention
    pooled_dim: int | None = None  # D' of the pooled vector; None: there is none
    max_length: int  # L: every caption is padded or cut to it
    trainable: bool  # trained along with the model; frozen otherwise

    def tokenize(self, captions: list[str]) -> Tensor:
        """B captions -> (B, L) int64 on the CPU, padded; one that is too long is cut, with one warning."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Condition:
        """(B, L) -> Condition. Call the module, not this, so that hooks and compilation apply."""
        raise NotImplementedError

    def hidden_states(self, ids: Tensor, clip_skip: int) -> Condition:
        """(B, L) -> what `forward` would give without the last `clip_skip` layers, at least one."""
        raise ConfigError(f"clip_skip={clip_skip}: {type(self).__name__} has no layers to skip. Use clip_skip=0.")

    def encode(self, captions: list[str], clip_skip: int = 0) -> Condition:
        """B captions -> Condition on the encoder's device. The empty caption is the unconditional one."""
        return self.states(self.tokenize(captions), clip_skip)

    def states(self, ids: Tensor, clip_skip: int = 0) -> Condition:
        """(B, L) on any device -> Condition on the encoder's. clip_skip: last layers left out, as in diffusers."""
        parameter = next(self.parameters(), None)
        ids = ids if parameter is None else on_device(ids, parameter.device)
        return self.hidden_states(ids, clip_skip) if clip_skip else self(ids)

    def save_tokenizer(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` reads, in CLIP's layout; nothing where there is no tokenizer."""
        raise NotImplementedError


class CLIPTokenized(TextEncoder):
    """A text encoder whose words come from a CLIP tokenizer, loaded at the first caption if `tokenizer` is a folder."""

    def __init__(self, vocab_size: int, max_length: int, tokenizer: str | None):
        super().__init__()
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._tokenizer_folder = tokenizer
        self._tokenizer: CLIPTokenizer | None = None
        self._warned = False
        self._words: dict[str, Tensor] = {}  # new words and their vectors (n, width), in order
        self._reads_words: CLIPTokenizer | None = None  # the tokenizer with the new words in it

    @property
    def token_embedding(self) -> nn.Embedding:
        """A row for each token, (vocab_size, width)."""
        raise NotImplementedError(f"{type(self).__name__} has no rows for its tokens.")

    def add_word(self, word: str, vectors: Tensor) -> None:
        """`word` in a text stands for `vectors` (n, width) from now on; the tokenizer that is saved is not changed."""
        self.check_word(word)
        added = word.lower() in self._words
        if added or len(self.tokens(word)) == 1:
            known = "was added before" if added else "is an ordinary word of this model"
            raise ConfigError(f"'{word}' {known}: what prompts mean by it would change. Give a new one, like <new>.")
        self._words[word.lower()] = vectors
        self._read_words()

    def check_word(self, word: str) -> None:
        """ConfigError for what can be no word in any vocabulary."""
        if not word or any(c.isspace() for c in word):
            raise ConfigError(f"'{word}' cannot be a new word: give one without blanks, like <new>.")

    def remove_word(self, word: str) -> None:
        del self._words[word.lower()]
        self._read_words()

    def _read_words(self) -> None:
        from ldm.text.tokenizer import with_words

        self._reads_words = with_words(self.tokenizer, list(self._words)) if self._words else None

    def _expanded(self, tokens: list[Token]) -> list[Token]:
        """A new word's token as one for each of its vectors: rows that follow the embedding's own."""
        rows, start = {}, self.vocab_size
        for i, vectors in enumerate(self._words.values()):
            rows[len(self.tokenizer) + i] = range(start, start + len(vectors))
            start += len(vectors)
        return [Token(row, t.start, t.end) for t in tokens for row in rows.get(t.id, (t.id,))]

    @property
    def has_tokenizer(self) -> bool:
        """Whether words come from somewhere: a tokenizer that was set, or the folder that was named."""
        return self._tokenizer is not None or self._tokenizer_folder is not None

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer, once there is one."""
        if self._tokenizer is None and self._tokenizer_folder is not None:
            self.load_tokenizer(self._tokenizer_folder)
        if self._tokenizer is None:
            raise ConfigError(
                "the text encoder has no tokenizer yet. Name its folder, text_encoder.tokenizer=DIR, "
                "or build one from your captions: ldm.text.tokenizer.build_tokenizer."
            )
        return self._tokenizer

    def set_tokenizer(self, tokenizer: CLIPTokenizer) -> None:
        """Takes a tokenizer of at most `vocab_size` tokens; rows of the embedding beyond its own stay unused."""
        if len(tokenizer) > self.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder rows for {self.vocab_size}. "
                f"Use text_encoder.vocab_size={len(tokenizer)}, or build a smaller tokenizer."
            )
        if (largest := max(tokenizer.get_vocab().values(), default=0)) >= self.vocab_size:
            raise ConfigError(
                f"the tokenizer has a token of id {largest}, the text encoder {self.vocab_size} rows: they "
                "are not of one model. Fetch both again."
            )
        tokenizer.model_max_length = self.max_length  # diffusers pads to what the saved tokenizer says
        self._tokenizer = tokenizer

    def load_tokenizer(self, directory: str | Path) -> None:
        """Reads vocab.json + merges.txt or tokenizer.json."""
        from ldm.text.tokenizer import load_tokenizer

        self.set_tokenizer(load_tokenizer(directory))

    def save_tokenizer(self, directory: str | Path) -> None:
        from ldm.text.tokenizer import save_tokenizer

        save_tokenizer(self.tokenizer, directory)

    def tokenize(self, captions: list[str]) -> Tensor:
        from ldm.text.tokenizer import content, with_special_tokens

        if self._words:
            rows = [[token.id for token in self.tokens(caption)] for caption in captions]
        else:
            rows = content(self.tokenizer, captions)
        for caption, row in zip(captions, rows, strict=True):
            if len(row) > self.max_tokens:
                self.warn_of_cut(caption)
        return with_special_tokens(self.tokenizer, [row[: self.max_tokens] for row in rows], self.max_length)

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption between its two marks."""
        return self.max_length - 2

    def tokens(self, text: str) -> list[Token]:
        """All tokens of a text, however long, without the marks."""
        from ldm.text.tokenizer import located

        if self._reads_words is None:
            return located(self.tokenizer, text)
        return self._expanded(located(self._reads_words, text))

    def frame(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """B rows of at most `room` token ids -> (B, L) on the CPU: each between its marks, and padded."""
        from ldm.text.tokenizer import with_special_tokens

        return with_special_tokens(self.tokenizer, rows, self.max_length)

    def warn_of_cut(self, caption: str) -> None:
        """Says that captions are too long, once, by this example."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"captions of more than {self.max_length} tokens are cut, such as '{caption[:60]}...'. "
            "A text encoder that is trained here can take more, text_encoder.max_length; sampling can read long ones "
            "in chunks. This is said once.",
            stacklevel=3,
        )
