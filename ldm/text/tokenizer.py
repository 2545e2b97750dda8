"""CLIP's byte-level BPE: its files, and new ones made from the captions at hand.

Text is brought to NFC, lower case and single spaces, split into words, digits and punctuation, and each piece into
bytes; `</w>` marks the last one of a piece. The splitting is transformers' own, so that all who load the files agree;
the merges are learnt here, because the trainer of `tokenizers` breaks ties differently from run to run.
"""

from __future__ import annotations

import copy
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken
from torch import Tensor

from ldm.errors import ConfigError
from ldm.text.encoder import Token
from ldm.text.tokenizer_files import checked_copy
from ldm.untrusted import shown

if TYPE_CHECKING:  # transformers takes seconds to import: late
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

Pair = tuple[str, str]


def build_tokenizer(captions: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """A tokenizer of at most `vocab_size` tokens, the same to the bit for the same captions in any order.

    514 of them are the bytes, alone and at a word's end, and the two marks: no text is ever unknown.
    """
    alphabet = byte_alphabet()
    symbols = alphabet + [symbol + WORD_END for symbol in alphabet]
    merges_max = vocab_size - len(symbols) - 2
    if merges_max < 0:
        raise ConfigError(f"vocab_size={vocab_size} is too small: the bytes alone take {len(symbols) + 2}. Use 1024.")
    merges = learn_merges(_count_pieces(captions), merges_max)
    # Two ways of merging may end in the same token: it has one id.
    tokens = list(dict.fromkeys([*symbols, *(a + b for a, b in merges)])) + [START, END]
    return _tokenizer({token: i for i, token in enumerate(tokens)}, merges)


def load_tokenizer(directory: str | Path) -> CLIPTokenizer:
    """Reads a folder with vocab.json + merges.txt (as published) or tokenizer.json (as transformers 5 writes)."""
    from transformers import CLIPTokenizer

    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise ConfigError(
            f"{directory} holds no tokenizer: neither vocab.json + merges.txt nor tokenizer.json is there."
        )
    with checked_copy(directory) as copy:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(copy), local_files_only=True)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of its Rust half
                raise
            raise ConfigError(f"{directory} holds no tokenizer that can be read ({shown(error, 120)}).") from error
    # How it was loaded is no property of it; saving would write it down.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    _check_ids(tokenizer, directory)
    return tokenizer


def _check_ids(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """ConfigError where a token has another's id, or a mark none."""
    ids = tokenizer.get_vocab().values()
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{directory}: several tokens have one id: its files are of two tokenizers.")
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if tokenizer.unk_token not in own:
        raise ConfigError(f"{directory}: its vocabulary has no {tokenizer.unk_token}, for what it does not know.")
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise ConfigError(f"{directory}: its {name} is no token of the vocabulary. Fetch it again.")


def save_tokenizer(tokenizer: CLIPTokenizer, directory: str | Path) -> None:
    """Writes both layouts side by side, with special_tokens_map.json and tokenizer_config.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(directory))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write(directory / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    _write(directory / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    special = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    _write(directory / "special_tokens_map.json", json.dumps(special, indent=2))


def content(tokenizer: CLIPTokenizer, captions: list[str]) -> list[list[int]]:
    """The ids of each caption, however long, without the marks."""
    if not captions:
        return []
    return [list(row) for row in tokenizer(captions, add_special_tokens=False, verbose=False)["input_ids"]]


def located(tokenizer: CLIPTokenizer, text: str) -> list[Token]:
    """The same ids with the characters of the text that they stand for."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [Token(i, start, end) for i, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def with_words(tokenizer: CLIPTokenizer, words: list[str]) -> CLIPTokenizer:
    """A copy that takes each word for one token, with ids behind its own.

    A word of letters counts only where it stands alone.
    """
    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(word, single_word=word.isalnum(), normalized=True) for word in words])
    return made


def with_special_tokens(tokenizer: CLIPTokenizer, rows: Sequence[Sequence[int]], max_length: int) -> Tensor:
    """B rows of at most max_length - 2 ids -> (B, max_length): start mark, row, end mark, padding."""
    ids = torch.full((len(rows), max_length), tokenizer.pad_token_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row) + 2] = torch.tensor([tokenizer.bos_token_id, *row, tokenizer.eos_token_id])
    return ids


# Learning.


def learn_merges(pieces: dict[tuple[str, ...], int], count: int) -> list[Pair]:
    """At most `count` merges (Sennrich et al. 2016): always the most frequent pair, of equals the first in text order.

    pieces: how often each sequence of symbols occurs.
    """
    words, counts = [list(piece) for piece in pieces], list(pieces.values())
    frequency: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            frequency[pair] += counts[index]
            where[pair].add(index)
    queue = [(-n, pair) for pair, n in frequency.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(merges) < count:
        negative, best = heapq.heappop(queue)
        if frequency[best] != -negative or negative == 0:
            continue  # an entry from before its count changed
        merges.append(best)
        changed: Counter[Pair] = Counter()
        for index in where.pop(best):
            before, words[index] = words[index], _merged(words[index], best)
            for pair in pairwise(before):
                changed[pair] -= counts[index]
            for pair in pairwise(words[index]):
                changed[pair] += counts[index]
                where[pair].add(index)
        for pair, difference in changed.items():
            if difference:
                frequency[pair] += difference
                heapq.heappush(queue, (-frequency[pair], pair))
    return merges


def _merged(word: list[str], pair: Pair) -> list[str]:
    result: list[str] = []
    i = 0
    while i < len(word):
        both = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        result.append(word[i] + word[i + 1] if both else word[i])
        i += 2 if both else 1
    return result


def _count_pieces(captions: Iterable[str]) -> dict[tuple[str, ...], int]:
    """How often each piece of text occurs, as its byte symbols, the last one with the mark of a word's end."""
    backend = _tokenizer({START: 0, END: 1}, []).backend_tokenizer
    counts: Counter[str] = Counter()
    for caption, n in Counter(captions).items():
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption)):
            counts[piece] += n
    return {(*piece[:-1], piece[-1] + WORD_END): counts[piece] for piece in sorted(counts)}


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Bytes that would print as nothing are moved behind Latin-1, in order.
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _tokenizer(vocab: dict[str, int], merges: list[Pair]) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # pairs are what the Rust side takes
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
