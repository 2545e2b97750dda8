"""Adapters of other programs: `read_adapter` any layout, `write_adapter` in any, `adapter_kind` of a path."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters.content import Content, Embedding, HypernetworkTensors, Lora
from ldm.atomic import atomic_write
from ldm.errors import ConfigError
from ldm.formats.adapters import embedding, hypernetwork, lora, lora_write
from ldm.formats.adapters.kind import AdapterKind, located, opened_as
from ldm.formats.checkpoint import DTYPES
from ldm.formats.files.open import load_nested
from ldm.formats.files.store import cast
from ldm.untrusted import interpreted

__all__ = ["FORMATS", "AdapterKind", "adapter_kind", "read_adapter", "write_adapter"]

# What each kind of content is called, and the formats that it is written in -> the end of the file's name.
FORMATS: dict[type, tuple[str, dict[str, str]]] = {
    Lora: ("a LoRA", {"kohya": ".safetensors", "peft": ".safetensors"}),
    Embedding: ("an embedding", {"diffusers": ".safetensors", "a1111": ".pt", "kohya": ".safetensors"}),
    HypernetworkTensors: ("a hypernetwork", {"a1111": ".pt"}),
}


def adapter_kind(path: str | Path) -> AdapterKind:
    """What an adapter's file or folder is, from what is in it. ConfigError for anything that is not read here."""
    with interpreted(f"{path}"):
        return opened_as(located(path))[0]


def read_adapter(path: str | Path, names: Collection[str] | None = None, token: str | None = None) -> Content:
    """An adapter of any program in our names, its tensors in float32, complete or refused.

    path: a .safetensors, .pt or .bin file, a folder that diffusers or peft wrote, or a hub id of one.
    names: the base's weights ("unet.conv_in.weight"): what a LoRA changes must be among them, and the paths in which
    kohya's files keep no dots are found by them. None: Stable Diffusion's words stand in, and nothing is checked.
    token: what an embedding is to be called, alone or the only one in a LoRA's file; None: what the file says, else the
    file's name.
    """
    with interpreted(f"{path}"):
        return _read(path, names, token)


def _read(path: str | Path, names: Collection[str] | None, token: str | None) -> Content:
    file = located(path)
    found, opened = opened_as(file)
    if found == "lora":
        return _renamed(lora.read(opened, names, file), token, path)
    if token is not None and found != "textual_inversion":
        raise ConfigError(f"token={token} names an embedding, and {path} is a {found}: leave it out.")
    if found == "textual_inversion":
        return embedding.read(load_nested(file), opened.metadata, token, file)
    return hypernetwork.read(load_nested(file), file)


def _renamed(content: Lora, token: str | None, path: str | Path) -> Lora:
    """With another word for the one embedding that the file bundles."""
    if token is None:
        return content
    if len(content.words) != 1:
        count = f"a lora with {len(content.words)} embeddings" if content.words else "a lora"
        raise ConfigError(f"token={token} names an embedding, and {path} is {count}: leave it out.")
    return replace(content, words=[replace(content.words[0], token=token)])


def write_adapter(content: Content, path: str | Path, format: str, dtype: str = "float32") -> None:
    """Writes an adapter in another program's format, whole or not at all; FORMATS lists them by kind.

    What the format cannot carry is refused by name before anything is written, and so is a path that exists.
    """
    path = Path(path)
    called, ends = FORMATS[type(content)]
    if format not in ends:
        raise ConfigError(f"format={format} is not one that {called} is written in: choose {' or '.join(ends)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not known: choose one of {', '.join(DTYPES)}.")
    if path.suffix != ends[format]:
        raise ConfigError(f"output={path}: {called} as format={format} is a {ends[format]} file: give it that end.")
    if path.exists():
        raise ConfigError(f"output={path} exists already: give another output=, or remove it first.")
    packed: dict[Any, Any]
    metadata: dict[str, str] = {}
    if isinstance(content, Lora):
        pack = lora_write.kohya if format == "kohya" else lora_write.peft
        packed, metadata = pack(content, path)
    elif isinstance(content, Embedding):
        packed, metadata = embedding.pack(content, format, path)
    else:
        packed = hypernetwork.pack(content, path)
    stored = _stored(packed, DTYPES[dtype])
    with atomic_write(path) as part:
        if path.suffix == ".pt":
            torch.save(stored, part)
        else:
            save_file(stored, part, metadata={"format": "pt"} | metadata)


def _stored(value: Any, dtype: torch.dtype, name: str = "the adapter") -> Any:
    """The same nested content with its tensors in `dtype`, in memory of their own; single numbers stay as they are."""
    if isinstance(value, Tensor):
        return cast(value, dtype if value.ndim else value.dtype, name).contiguous().clone()
    if isinstance(value, dict):
        return {k: _stored(v, dtype, str(k)) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_stored(v, dtype, name) for v in value)
    return value
