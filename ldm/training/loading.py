"""A model from any layout, and into any: runs of ours, diffusers' folders, single files, hub ids."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import ConfigError
from ldm.formats import checkpoint as foreign
from ldm.formats import schedulers
from ldm.training.adapters import merged_states
from ldm.training.assemble import DIFFUSION_NODES, Parts, build_parts, fill_parts, load_trained
from ldm.training.checkpoints import Content, find, read_config, write
from ldm.training.run_directory import alone

FORMATS = ("ldm", *foreign.FORMATS)


@dataclass
class Loaded:
    """Modules with their weights, the configuration that builds them, and where they come from."""

    parts: Parts
    config: dict[str, Any]
    folder: Path  # the checkpoint folder of a run of ours, else the path that was given
    scheduler_config: dict[str, Any] | None = None  # diffusers' scheduler_config.json, where there is one


def load_any(path: str | Path, weights: str = "ema", config: str | Path | None = None) -> Loaded:
    """Parts of a checkpoint in anybody's layout. ConfigError says what is wrong with it."""
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights} is not known: choose ema or raw.")
    path = Path(path).expanduser()  # shells leave checkpoint=~/x as it is
    if foreign.kind(path) == "ldm":
        parts, nodes, folder = load_trained(path, weights)
        return Loaded(parts, nodes, folder, nodes.get("scheduler_config"))
    checkpoint = foreign.read(path, config, weights)
    if "vae" not in checkpoint.states:
        raise ConfigError(
            f"{path} holds {' and '.join(checkpoint.states)} alone: give the folder of the whole pipeline, "
            "the one with model_index.json in it."
        )
    nodes = {"module": "latent_diffusion" if "unet" in checkpoint.states else "autoencoder", **checkpoint.config}
    if checkpoint.scheduler_config is not None:
        nodes |= schedulers.nodes(checkpoint.scheduler_config)
    parts = build_parts(nodes, checkpoint.tokenizer)
    fill_parts(parts, checkpoint.states, path)
    return Loaded(parts, nodes, path, checkpoint.scheduler_config)


def as_ours(values: Mapping[str, Any]) -> Path:
    """The checkpoint folder of ours for checkpoint=, in anybody's layout: converted into outputs/stages once.

    values: a configuration's checkpoint, weights, config and outputs. Processes that ask for the same take turns.
    """
    path, weights, config = values["checkpoint"], values["weights"], values["config"]
    place = Path(path).expanduser()
    if foreign.kind(path) == "ldm":
        return find(place)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    fingerprint = hashlib.sha256(repr((str(path), weights, str(config), stamps)).encode()).hexdigest()[:8]
    target = Path(values["outputs"]) / "stages" / f"checkpoint-{fingerprint}"
    with alone(values["outputs"], "checkpoint"):
        if not target.is_dir():
            save_any(load_any(path, weights, config), target, "ldm")
    return target


def adopted(folder: Path) -> dict[str, Any]:
    """The nodes that a run takes over from a checkpoint folder of ours, so that its parts fit as they are."""
    saved = read_config(folder)
    missing = [k for k in DIFFUSION_NODES if k not in saved]
    if missing:
        raise ConfigError(
            f"checkpoint={folder} is no latent diffusion model (it has no {missing[0]}): adopt=true needs a whole one."
        )
    nodes = {k: dict(saved[k]) for k in DIFFUSION_NODES}
    for node in nodes.values():
        if "pretrained" in node:
            node["pretrained"] = None  # the checkpoint has the weights
    return {**nodes, "image_size": saved.get("image_size"), "scheduler_config": saved.get("scheduler_config")}


def save_any(loaded: Loaded, path: str | Path, format: str, dtype: str = "float32") -> None:
    """Writes "ldm" (a checkpoint folder of ours), "diffusers" (a folder) or "compvis" (one .safetensors or .ckpt).

    ConfigError for what the format cannot carry, and for a path that exists or cannot be written.
    """
    path = Path(path)
    check_target(path, format)
    try:
        _save(loaded, path, format, dtype)
    except OSError as error:
        raise ConfigError(f"output={path}: cannot be written ({error.strerror or error}).") from error


def check_target(path: Path, format: str) -> None:
    """ConfigError where `save_any` would refuse whatever the model is."""
    if format not in FORMATS:
        raise ConfigError(f"format={format} is not known: choose one of {', '.join(FORMATS)}.")
    if path.exists():
        raise ConfigError(f"output={path} exists already: give another output=, or remove it first.")


def _save(loaded: Loaded, path: Path, format: str, dtype: str) -> None:
    parts, config = loaded.parts, loaded.config
    states = merged_states(parts)
    config = {k: v for k, v in config.items() if k != "adapter"}
    if format == "ldm":
        if dtype != "float32":
            raise ConfigError(f"dtype={dtype}: format=ldm stores float32; use format=diffusers or compvis.")
        text = yaml.safe_dump({**config, "scheduler_config": loaded.scheduler_config}, sort_keys=False)
        words = None if parts.text_encoder is None else parts.text_encoder.save_tokenizer
        write(path, Content(states, {}, {"global_step": 0}, text, (), words), step=0)
        return
    described = loaded.scheduler_config
    if described is None and "scheduler" in config:
        described = schedulers.scheduler_config(config["scheduler"], config["parameterization"])
    nodes: dict[str, Any] = {
        k: config[k] for k in ("model", "autoencoder", "text_encoder", "image_size") if k in config
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None
        if parts.text_encoder is not None:
            tokenizer = Path(folder)
            parts.text_encoder.save_tokenizer(tokenizer)
        foreign.write(foreign.Checkpoint(nodes, states, described, tokenizer), path, format, dtype)
