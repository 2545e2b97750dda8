"""Prompt weights: `(word:1.3)`, `(word)`, `[word]`, as people write them for Stable Diffusion."""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple

UP = 1.1  # (word); [word] is its inverse
LIMIT = 100.0  # the largest weight, however deep brackets nest
CLOSES = {")": "(", "]": "["}
ESCAPED = set("()[]\\")
# ":1.3)" at the end of round brackets. The bracket itself is looked at, not taken.
NUMBER = re.compile(r":\s*(\d{1,3}(?:\.\d*)?|\.\d+)\s*(?=\))", re.ASCII)


class _Pair(NamedTuple):
    """Where a pair of brackets closes, where its text ends (before its number, if any), and the factor inside."""

    close: int
    text_end: int
    factor: float


def parse(prompt: str) -> list[tuple[str, float]]:
    """A prompt -> its pieces of text in order, each with its weight. Any string is a prompt; nothing is an error.

    (text) is 1.1, [text] is 1/1.1, (text:1.3) is 1.3; nested weights multiply. A backslash before a bracket or another
    backslash makes it an ordinary character. So is a bracket without a partner: a closing one belongs to the nearest
    open one of its kind, and open ones in between have none. Neighbours of equal weight are one piece, so that a
    prompt without brackets is one piece of weight 1, and the empty prompt none.
    """
    pairs = _pairs(prompt)
    closing = {pair.close for pair in pairs.values()}
    ends = {pair.text_end: pair.close for pair in pairs.values()}
    weighted: list[tuple[str, float]] = []
    weights = [1.0]
    i = 0
    while i < len(prompt):
        if i in pairs:
            weights.append(min(weights[-1] * pairs[i].factor, LIMIT))
        elif i in closing:
            weights.pop()
        elif i in ends:  # a number: it has been read
            i = ends[i]
            continue
        else:
            i += _is_escape(prompt, i)
            weighted.append((prompt[i], weights[-1]))
        i += 1
    return [("".join(c for c, _ in piece), weight) for weight, piece in groupby(weighted, key=lambda pair: pair[1])]


def _pairs(prompt: str) -> dict[int, _Pair]:
    """Position of an opening bracket -> its pair."""
    numbers = {found.end(): found for found in NUMBER.finditer(prompt)}
    pairs: dict[int, _Pair] = {}
    stack: list[int] = []
    waiting = {"(": 0, "[": 0}
    i = 0
    while i < len(prompt):
        character = prompt[i]
        if _is_escape(prompt, i):
            i += 1
        elif character in waiting:
            stack.append(i)
            waiting[character] += 1
        elif character in CLOSES and waiting[CLOSES[character]]:
            while True:  # open ones in between stay without a partner
                start = stack.pop()
                waiting[prompt[start]] -= 1
                if prompt[start] == CLOSES[character]:
                    break
            number = numbers.get(i)
            if character == "]":
                pairs[start] = _Pair(i, i, 1 / UP)
            elif number is None:
                pairs[start] = _Pair(i, i, UP)
            else:
                pairs[start] = _Pair(i, number.start(), float(number[1]))
        i += 1
    return pairs


def _is_escape(prompt: str, i: int) -> bool:
    return prompt[i] == "\\" and i + 1 < len(prompt) and prompt[i + 1] in ESCAPED
