"""Prompts to conditions, as people write prompts: long ones, weighted words, earlier layers of the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.text.encoder import CLIPTokenized, TextEncoder, Token
from ldm.text.weights import parse

Chunk = list[tuple[int, float]]  # (id, weight) of the tokens that are encoded together


@dataclass(frozen=True)
class Prompts:
    """How prompts are read when sampling. With every option off they are captions, as in training.

    clip_skip: layers of the text encoder left out for the prompt, not for the negative one (as diffusers does).
    chunked: a prompt too long for the text encoder is encoded in pieces, their states one behind the other; all prompts
        of a batch and their negative ones get as many, with empty ones behind. Otherwise what is too long is cut.
    weighted: (word:1.3), (word) and [word] weigh a word's states (`ldm.text.weights`), in negative prompts too.
    """

    clip_skip: int = 0
    chunked: bool = False
    weighted: bool = False

    def __post_init__(self):
        if self.clip_skip < 0:
            raise ConfigError(f"clip_skip={self.clip_skip}: layers left out are counted from 0, for none.")

    def encode(
        self, text_encoder: TextEncoder, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None
    ) -> tuple[Condition, Condition | None]:
        """(the prompts' conditions, the negative prompts'), on the text encoder's device.

        The second is None where no negative prompts are given, and where there is no text that they could be told in.
        """
        if text_encoder.context_dim is None and text_encoder.pooled_dim is None:
            return text_encoder.encode(list(prompts), self.clip_skip), None
        if not self.chunked and not self.weighted:
            cond = text_encoder.encode(list(prompts), self.clip_skip)
            return cond, None if negative_prompts is None else text_encoder.encode(list(negative_prompts))
        if not isinstance(text_encoder, CLIPTokenized):
            raise ConfigError(
                f"{type(text_encoder).__name__} has no tokens of words: it reads neither long prompts in chunks nor "
                "prompt weights. Leave both off."
            )
        positive = [self._chunks(text_encoder, prompt) for prompt in prompts]
        negative = [self._chunks(text_encoder, prompt) for prompt in negative_prompts or ()]
        count = max((len(chunks) for chunks in positive + negative), default=1)
        cond = _states(text_encoder, positive, count, self.clip_skip)
        return cond, None if negative_prompts is None else _states(text_encoder, negative, count, 0)

    def _chunks(self, text_encoder: CLIPTokenized, prompt: str) -> list[Chunk]:
        pieces = parse(prompt) if self.weighted else [(prompt, 1.0)]
        text = "".join(piece for piece, _ in pieces)
        # The text is tokenized as a whole: which tokens it has does not depend on their weights.
        weights = [weight for piece, weight in pieces for _ in piece]
        words = [[(t.id, weights[t.start]) for t in word] for word in _words(text, text_encoder.tokens(text))]
        if self.chunked:
            return in_chunks(words, text_encoder.max_tokens)
        tokens = [token for word in words for token in word]
        if len(tokens) > text_encoder.max_tokens:
            text_encoder.warn_of_cut(text)
        return [tokens[: text_encoder.max_tokens]]


def in_chunks(words: Sequence[Chunk], size: int) -> list[Chunk]:
    """Words in order, at most `size` tokens a chunk, at least one chunk; only a word longer than a chunk is divided."""
    chunks: list[Chunk] = [[]]
    for word in words:
        if len(chunks[-1]) + len(word) > size >= len(word):
            chunks.append([])
        for token in word:
            if len(chunks[-1]) == size:
                chunks.append([])
            chunks[-1].append(token)
    return chunks


def weigh(states: Tensor, weights: Tensor) -> Tensor:  # (B,L,D), (B,L) -> (B,L,D)
    """Each token's states times its weight, then the whole of each prompt scaled back to the mean that it had.

    The mean is what Stable Diffusion's users know, but it is no measure where tokens' means have both signs and cancel
    (states after a norm that has learnt no bias sum to nothing). Where they have one sign the scale lies between
    1/largest and 1/smallest weight, so that is where it is kept; a weight below 0.1 counts as 0.1 there.
    """
    states_weighted = states * weights[..., None].to(states)
    means, after = (s.float().mean(dim=(1, 2)) for s in (states, states_weighted))
    scale = (means / after).nan_to_num(1.0)
    scale = scale.clamp(1 / weights.amax(dim=1), 1 / weights.amin(dim=1).clamp(min=0.1))
    return states_weighted * scale[:, None, None].to(states)


def _words(text: str, tokens: Sequence[Token]) -> list[list[Token]]:
    """Tokens by word: what stands between white space, punctuation included."""
    words: list[list[Token]] = []
    for token in tokens:
        if words and not any(c.isspace() for c in text[words[-1][-1].start : token.start]):
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _states(text_encoder: CLIPTokenized, prompts: Sequence[list[Chunk]], count: int, clip_skip: int) -> Condition:
    """Every prompt in `count` chunks, each encoded by itself: context (B, count L, D)."""
    chunks = [chunk for prompt in prompts for chunk in [*prompt, *[[]] * (count - len(prompt))]]
    cond = text_encoder.states(text_encoder.frame([[i for i, _ in chunk] for chunk in chunks]), clip_skip)
    assert cond.context is not None
    context = cond.context.reshape(len(prompts), -1, cond.context.shape[-1])
    weights = torch.ones(len(chunks), text_encoder.max_length)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : 1 + len(chunk)] = torch.tensor([weight for _, weight in chunk])  # behind the start mark
    weights = weights.reshape(len(prompts), -1)
    if (weights == 1).all():
        return replace(cond, context=context)
    return replace(cond, context=weigh(context, weights.to(context.device)))
