"""Textual inversion (Gal et al. 2023) in the files of A1111's web page, diffusers, kohya's scripts and OneTrainer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.adapters.content import Embedding
from ldm.errors import ConfigError
from ldm.formats.adapters.tensors import read_weights

_NAMELESS = ("emb_params", "emp_params")  # kohya's and OneTrainer's only entry, which says no word
_TRIGGER = "modelspec.trigger_phrase"  # where a nameless file's metadata may say it
_ANY = "*"  # A1111's name of whatever is trained


def read(content: Mapping[Any, Any], metadata: Mapping[str, str], token: str | None, file: Path) -> Embedding:
    """One new word of a file, with its vectors as (n, width). ConfigError for damaged files and for several words."""
    said, found = _a1111(content, file) if "string_to_param" in content else _single(content, metadata, file)
    return Embedding(token or said or file.stem, _vectors(found, f"{file}: the embedding"))


# An embedding inside a LoRA's file: its word, then any layout of an embedding, flattened.
BUNDLED = "bundle_emb."
_ENTRY = re.compile(
    r"bundle_emb\.(?P<word>.+?)\.(?:(?P<vectors>string_to_param\.[^.]+|em[bp]_params|clip_l)|string_to_token\..*)"
)


def read_bundled(tensors: Mapping[str, Tensor], file: Path) -> list[Embedding]:
    """The words in a LoRA's file, as A1111's page and OneTrainer bundle them, in the file's order."""
    words: dict[str, Embedding] = {}
    for key, tensor in tensors.items():
        if not key.startswith(BUNDLED):
            continue
        entry = _ENTRY.fullmatch(key)
        if entry is None:
            raise ConfigError(f"{file} has {key}, which is no embedding of a kind that is read. Fetch it again.")
        word = entry["word"]
        if entry["vectors"] is None:
            continue
        if word in words:
            raise ConfigError(f"{file} has the embedding {word} twice, in two spellings: which holds cannot be told.")
        words[word] = Embedding(word, _vectors(tensor, f"{file}: the embedding {word}"))
    return list(words.values())


def pack_bundled(words: Iterable[Embedding]) -> dict[str, Tensor]:
    """The same in A1111's layout, which all readers of bundles know."""
    return {f"{BUNDLED}{word.token}.string_to_param.{_ANY}": word.vectors for word in words}


def _vectors(found: Any, what: str) -> Tensor:
    vectors = read_weights(found, what)
    if vectors.ndim not in (1, 2) or vectors.numel() == 0:
        raise ConfigError(f"{what} is {tuple(vectors.shape)}, and vectors of words are (n, width). Fetch it again.")
    return vectors.reshape(-1, vectors.shape[-1])


def pack(content: Embedding, format: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file of a format holds, and its metadata. ConfigError where diffusers' has no word to name it by."""
    if format == "a1111":
        name = content.token or path.stem
        return {
            "string_to_token": {_ANY: 265},  # the page's own: where CLIP's vocabulary has its star
            "string_to_param": {_ANY: content.vectors},
            "name": name,
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
        }, {}
    if format == "kohya":
        return {_NAMELESS[0]: content.vectors}, {} if content.token is None else {_TRIGGER: content.token}
    if not content.token:
        raise ConfigError("format=diffusers names an embedding by its word, and this one has none: give token=WORD.")
    return {content.token: content.vectors}, {}


def _a1111(content: Mapping[Any, Any], file: Path) -> tuple[str | None, Tensor]:
    """The word and vectors of A1111's layout, and of the first textual inversions', whose entry is the word itself."""
    strings = content["string_to_param"]
    if not isinstance(strings, Mapping) or len(strings) != 1:
        count = len(strings) if isinstance(strings, Mapping) else "no"
        raise ConfigError(f"{file} holds {count} words: one a file is read. Save them as files of their own.")
    [(word, vectors)] = strings.items()
    return (str(content.get("name") or "") if word == _ANY else str(word)), vectors


def _single(content: Mapping[Any, Any], metadata: Mapping[str, str], file: Path) -> tuple[str | None, Tensor]:
    if len(content) != 1:
        some = ", ".join(str(key) for key in list(content)[:3])
        raise ConfigError(
            f"{file} holds {len(content)} words ({some}): one a file is read. Save them as files of their own."
        )
    [(word, vectors)] = content.items()
    return (metadata.get(_TRIGGER) if word in _NAMELESS else str(word)), vectors
