"""A model from any layout, and into any: runs of ours, diffusers' folders, single files, hub ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.allowed import only_allowed, refuse_nodes
from ldm.checkpoints.components import (
    Components,
    attach_adapters,
    build_components,
    check_stored,
    is_whole,
    load_states,
)
from ldm.checkpoints.folder import find, load_parts, read_config
from ldm.errors import ConfigError
from ldm.formats import checkpoint as foreign
from ldm.formats import schedulers
from ldm.formats.content import DIFFUSION_NODES, Stored
from ldm.models.inputs import inpainting_channels


def open_any(path: str | Path, weights: str = "ema", config: str | Path | None = None, whole: bool = True) -> Stored:
    """A checkpoint in anybody's layout, checked, whose tensors are read when they are touched.

    whole: parts that a file of a U-Net or a text encoder lacks come from config=, or it is refused; else they stay out.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights} is not known: choose ema or raw.")
    path = Path(path).expanduser()  # shells leave checkpoint=~/x as it is
    if foreign.kind(path) == "ldm":
        folder = find(path)
        saved, words = read_config(folder), folder / "tokenizer"
        tokenizer = words if words.is_dir() else None
        states = load_parts(folder, weights)
        check_stored(saved, states, folder)
        return Stored(saved, states, saved.get("scheduler_config"), tokenizer, folder)
    checkpoint = foreign.read_stored(path, config, weights)
    if whole and set(checkpoint.states) != {"vae"}:
        _complete(checkpoint, path, config, weights)
    nodes = dict(checkpoint.config)
    if checkpoint.scheduler_config is not None:
        refuse_nodes(checkpoint.scheduler_config, path)
        nodes |= schedulers.nodes(checkpoint.scheduler_config)
    return replace(checkpoint, config=only_allowed(nodes, path), folder=path)


_CALLED = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder"}


def _complete(checkpoint: Stored, path: Path, config: str | Path | None, weights: str) -> None:
    """Takes the parts that a checkpoint lacks from config=. ConfigError that names those which are nowhere."""
    missing = [part for part in foreign.PARTS if part not in checkpoint.states]
    if not missing:
        return
    other = None if config is None else _weights_of(config, weights)
    nowhere = [part for part in missing if other is None or part not in other.states]
    if nowhere:
        lacks, has = (" and no ".join(_CALLED[part] for part in parts) for parts in (nowhere, checkpoint.states))
        either = "" if other is None else f", and config={config} has none either"
        raise ConfigError(
            f"{path} has no {lacks}{either}: it holds {has.replace(' and no ', ' and ')} only. Give config=PATH, a "
            "diffusers folder or a run of the same model, and what is missing is taken from there."
        )
    assert other is not None
    for part in missing:
        checkpoint.states[part], key = other.states[part], foreign.PARTS[part]
        checkpoint.config[key] = other.config[key]
    if checkpoint.scheduler_config is None:
        checkpoint.scheduler_config = other.scheduler_config
    for key in ("scheduler", "parameterization", "image_size"):  # runs of ours may have those that no file describes
        if key in other.config:
            checkpoint.config.setdefault(key, other.config[key])
    checkpoint.tokenizer = checkpoint.tokenizer or other.tokenizer
    checkpoint.keep = [*checkpoint.keep, other]


def _weights_of(config: str | Path, weights: str) -> Stored:
    return open_any(run_or_folder(Path(config).expanduser()), weights, whole=False)


def run_or_folder(place: Path) -> Path:
    """Where a run's config.yaml lies, else the path itself."""
    return place.parent if place.is_file() and place.suffix in (".yaml", ".yml") else place


def load_any(path: str | Path, weights: str = "ema", config: str | Path | None = None) -> Components:
    """Modules of a checkpoint in anybody's layout. ConfigError says what is wrong with it."""
    stored = open_any(path, weights, config)
    assert stored.folder is not None
    parts = built(stored)
    load_states(parts, stored.states, stored.folder)
    attach_adapters(stored.config, parts, stored.states, stored.folder)
    return parts


def built(stored: Stored, device: str = "cpu") -> Components:
    """The modules of a checkpoint, its tensors not yet in them; device="meta": without memory."""
    parts = build_components(stored.config, stored.tokenizer, device, is_whole(stored.states))
    parts.folder, parts.scheduler_config = stored.folder, stored.scheduler_config
    return parts


def adopted(folder: Path, repaints: bool = False) -> dict[str, Any]:
    """The nodes that a run takes over from a checkpoint folder of ours, so that its parts fit as they are."""
    saved = read_config(folder)
    states = load_parts(folder)
    missing = [k for k in DIFFUSION_NODES if k not in saved or not is_whole(states)]
    if missing:
        raise ConfigError(
            f"checkpoint={folder} is no latent diffusion model (it has no {missing[0]}): adopt=true needs a whole one."
        )
    check_stored(saved, states, folder)
    nodes = {k: dict(saved[k]) for k in DIFFUSION_NODES}
    for node in nodes.values():
        if "pretrained" in node:
            node["pretrained"] = None  # the checkpoint has the weights
    if repaints:  # it sees a mask and a masked latent too; fresh channels start at zero
        nodes["model"]["in_channels"] = inpainting_channels(nodes["model"].get("out_channels", 4))
    return {**nodes, "image_size": saved.get("image_size"), "scheduler_config": saved.get("scheduler_config")}
