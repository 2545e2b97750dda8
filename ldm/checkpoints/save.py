"""A model in memory into any layout: a checkpoint folder of ours, a diffusers folder, a single file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ldm.checkpoints.adapters import merged_states
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import Content, State, write
from ldm.errors import ConfigError
from ldm.formats import checkpoint as foreign
from ldm.formats import schedulers
from ldm.formats.content import Stored

FORMATS = ("ldm", *foreign.FORMATS)


def save_any(parts: Components, path: str | Path, format: str, dtype: str = "float32") -> None:
    """Writes "ldm" (a checkpoint folder of ours), "diffusers" (a folder) or "compvis" (one .safetensors or .ckpt).

    LoRAs are worked into the weights. ConfigError for what the format cannot carry, and for a path that exists or
    cannot be written.
    """
    base = replace(parts, config={k: v for k, v in parts.config.items() if k != "adapter"})
    save_states(base, merged_states(parts), path, format, dtype)


def save_states(
    parts: Components, states: dict[str, State], path: str | Path, format: str, dtype: str = "float32"
) -> None:
    """`save_any` with other tensors than the modules', which may be on the meta device."""
    path = Path(path)
    check_target(path, format, dtype)
    try:
        if format == "ldm":
            text = yaml.safe_dump({**parts.config, "scheduler_config": parts.scheduler_config}, sort_keys=False)
            encoder = parts.text_encoder
            save_tokenizer = None if encoder is None else encoder.save_tokenizer
            write(path, Content(states, {}, {"global_step": 0}, text, (), save_tokenizer), step=0)
        else:
            with _tokenizer(parts) as words:
                foreign.write(_described(parts, states, words), path, format, dtype)
    except OSError as error:
        raise ConfigError(f"output={path}: cannot be written ({error.strerror or error}).") from error


def check_carries(parts: Components, format: str) -> None:
    """ConfigError that names what the format cannot carry; the modules may be on the meta device."""
    if format != "ldm":
        states = {k: dict(v.state_dict()) for k, v in parts.modules().items()}
        with _tokenizer(parts) as words:
            foreign.check(_described(parts, states, words), format)


def check_target(path: Path, format: str, dtype: str = "float32") -> None:
    """ConfigError where `save_any` would refuse whatever the model is."""
    if format not in FORMATS:
        raise ConfigError(f"format={format} is not known: choose one of {', '.join(FORMATS)}.")
    if path.exists():
        raise ConfigError(f"output={path} exists already: give another output=, or remove it first.")
    if dtype not in foreign.DTYPES:
        raise ConfigError(f"dtype={dtype} is not known: choose one of {', '.join(foreign.DTYPES)}.")
    if format == "ldm" and dtype != "float32":
        raise ConfigError(f"dtype={dtype}: format=ldm stores float32; use format=diffusers or compvis.")


@contextmanager
def _tokenizer(parts: Components) -> Iterator[Path | None]:
    """A folder with the text encoder's words, for as long as it is needed; None where there is no text encoder."""
    with tempfile.TemporaryDirectory() as folder:
        if parts.text_encoder is None:
            yield None
        else:
            parts.text_encoder.save_tokenizer(folder)
            yield Path(folder)


def _described(parts: Components, states: dict[str, State], words: Path | None) -> Stored:
    """The model as other programs' formats take it."""
    config, described = parts.config, parts.scheduler_config
    if described is None and "scheduler" in config:
        described = schedulers.scheduler_config(config["scheduler"], config["parameterization"])
    nodes: dict[str, Any] = {k: config[k] for k in (*foreign.PARTS.values(), "image_size") if k in config}
    return Stored(nodes, states, described, words)
