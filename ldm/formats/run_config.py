"""What a run of ours says of its model, for single files that do not: its config.yaml, and the tokenizer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.allowed import read_allowed
from ldm.errors import ConfigError
from ldm.formats import published, schedulers
from ldm.formats.content import PARTS, Stored, portable
from ldm.formats.diffusers.folder import Described
from ldm.formats.match import architecture, carries


def file_of(place: Path) -> Path | None:
    """The config.yaml that is meant by a run directory, a checkpoint folder or that file itself; None: neither."""
    file = place / "config.yaml" if place.is_dir() else place
    return file if file.is_file() and file.suffix in (".yaml", ".yml") else None


def describe(file: Path) -> Described:
    """Nodes, schedule and words of a run; latents in Stable Diffusion's units, as single files leave here.

    ConfigError where it is no run's configuration, or of a model that single files do not hold.
    """
    found = read_allowed(file)
    if not found.get("autoencoder"):
        raise ConfigError(f"config={file} has no autoencoder: give the config.yaml of a run, or a diffusers folder.")
    folders = [file.parent, *sorted(file.parent.glob("checkpoints/step-*"))]
    held = {part for part in PARTS for folder in folders if (folder / f"{part}.safetensors").is_file()}
    alone = "unet" not in held if held else not found.get("model")  # runs of autoencoders may describe networks too
    parts = {"vae": "autoencoder"} if alone else PARTS
    nodes: dict[str, Any] = {}
    for part, key in parts.items():
        node = found.get(key) or {}
        if not carries(node, part, vq=set(parts) == {"vae"}):
            raise ConfigError(
                f"config={file} has {key}={node.get('_target_')}: single files hold {architecture(part)} only. "
                "Give the run that the file comes from, or its checkpoint folder as checkpoint=."
            )
        nodes[key] = {k: v for k, v in portable(node).items() if k != "_convert_"}
    if "image_size" in found:
        nodes["image_size"] = found["image_size"]
    schedule = found.get("scheduler_config")
    if schedule is None and "model" in nodes:
        schedule = schedulers.scheduler_config(found["scheduler"], found["parameterization"])
        if schedule is None:
            raise ConfigError(
                f"config={file} has a scheduler or target that single files cannot carry: give the run that the file "
                "comes from, or its checkpoint folder as checkpoint=."
            )
    # A run keeps its words in its checkpoints, all the same ones; a checkpoint folder beside its own config.yaml.
    tokenizer = next((words for folder in reversed(folders) if (words := folder / "tokenizer").is_dir()), None)
    return Described(Stored(nodes, {}, schedule, tokenizer), published.SCALING)
