"""A tokenizer's files as somebody else wrote them, checked and copied without all that a CLIP tokenizer does not need.

transformers takes a tokenizer_config.json for arguments, paths of other files among them, and its libraries end the
process at some contradictions. What it is given here has a vocabulary, merges and marks that fit, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.errors import ConfigError
from ldm.untrusted import VOCABULARY, read_json, read_text, shown, whole

MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = {"errors": str, "do_lower_case": bool, "add_prefix_space": bool, "clean_up_tokenization_spaces": bool}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
Token = str | dict[str, Any]


@contextmanager
def checked_copy(directory: Path) -> Iterator[Path]:
    """Within the block a folder with what is needed of `directory`'s files; ConfigError where they do not fit.

    tokenizer.json is read before vocab.json and merges.txt, as transformers does.
    """
    with TemporaryDirectory(prefix="ldm-tokenizer-") as copy:
        target = Path(copy)
        if (directory / "tokenizer.json").is_file():
            _write(target / "tokenizer.json", _of_one_file(directory / "tokenizer.json"))
        else:
            vocab = _vocabulary(read_json(directory / "vocab.json", VOCABULARY), f"{directory / 'vocab.json'}")
            _write(target / "vocab.json", vocab)
            text = read_text(directory / "merges.txt", VOCABULARY)
            lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
            merges = _merges([tuple(line.split(" ")) for line in lines], vocab, f"{directory / 'merges.txt'}")
            (target / "merges.txt").write_text("\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
        for name, keep in (("tokenizer_config.json", True), ("special_tokens_map.json", False)):
            if (directory / name).is_file():
                found = read_json(directory / name, VOCABULARY)
                _write(target / name, _settings(found, f"{directory / name}", keep))
        if (directory / "added_tokens.json").is_file():
            added = read_json(directory / "added_tokens.json", VOCABULARY)
            _write(target / "added_tokens.json", _vocabulary(added, f"{directory / 'added_tokens.json'}"))
        yield target


def _of_one_file(path: Path) -> dict[str, Any]:
    found, where = read_json(path, VOCABULARY), f"{path}"
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise ConfigError(f"{where} has no byte-pair vocabulary, as CLIP's tokenizers have: it is another one's.")
    vocab = _vocabulary(model.get("vocab"), where)
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [list(pair) for pair in _merges(pairs, vocab, where)]
    added = found.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ConfigError(f"{where} has added_tokens that are no list of tokens: it was edited. Fetch it again.")
    tokens = [{"id": whole(t.get("id"), "id", where, 0), **_token(t, where)} for t in added]
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    settings = {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    return {
        "version": "1.0",
        **nothing,
        "added_tokens": tokens,
        "model": {**settings, "vocab": vocab, "merges": merges},
    }


def _vocabulary(found: Any, where: str) -> dict[str, int]:
    """Tokens and their ids: whole numbers, each once."""
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{where} has no vocabulary of tokens and their ids: it was edited. Fetch it again.")
    for token, i in found.items():
        whole(i, shown(token), where, 0)
    if len(set(found.values())) < len(found):
        raise ConfigError(f"{where} gives one id to several tokens: it was edited. Fetch it again.")
    return found


def _merges(pairs: list[Any], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Pairs of tokens that make a third; a vocabulary has all three."""
    for pair in pairs:
        texts = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not texts or not (pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab):
            raise ConfigError(
                f"{where} merges {shown(pair)}, which its vocabulary does not know all: one of them was cut short, or "
                "is another tokenizer's. Fetch both again."
            )
    return pairs


def _settings(found: Mapping[str, Any], where: str, decoder: bool) -> dict[str, Any]:
    """The marks and what CLIP's tokenizer takes besides; names of classes, files and templates stay out."""
    kept: dict[str, Any] = {k: found[k] for k, kind in _SETTINGS.items() if isinstance(found.get(k), kind)}
    for name in MARKS:
        if found.get(name) is not None:
            kept[name] = _token(found[name], where) if isinstance(found[name], dict) else found[name]
            if not isinstance(kept[name], str | dict):
                raise ConfigError(f"{where} says {name}={shown(found[name])}: a token belongs there. Fetch it again.")
            if isinstance(kept[name], dict):
                kept[name]["__type"] = "AddedToken"
    added = found.get("added_tokens_decoder")
    if decoder and added is not None:
        if not isinstance(added, dict) or not all(i.isdecimal() and isinstance(t, dict) for i, t in added.items()):
            raise ConfigError(f"{where} has an added_tokens_decoder that is no table of tokens. Fetch it again.")
        ids = [whole(int(i), "added_tokens_decoder", where, 0) for i in added]
        kept["added_tokens_decoder"] = {
            str(i): _token(token, where) for i, token in zip(ids, added.values(), strict=True)
        }
    return kept


def _token(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(found.get("content"), str) or not found["content"]:
        raise ConfigError(f"{where} has a token without text: it was edited. Fetch it again.")
    return {"content": found["content"], **{flag: found.get(flag, False) is True for flag in _FLAGS if flag in found}}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
