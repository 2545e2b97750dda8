"""A model from any layout, and into any: runs of ours, diffusers' folders, single files, hub ids."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ldm.allowed import only_allowed, refuse_nodes
from ldm.errors import ConfigError
from ldm.formats import checkpoint as foreign
from ldm.formats import schedulers
from ldm.formats.kinds import is_ours
from ldm.training.adapters import merged_states
from ldm.training.assemble import Parts, attach_adapters, build_parts, check_stored, fill_parts
from ldm.training.checkpoints import DIFFUSION_NODES, Content, State, find, load_parts, read_config, write
from ldm.training.run_directory import alone

FORMATS = ("ldm", *foreign.FORMATS)


@dataclass
class Loaded:
    """Modules with their weights, the configuration that builds them, and where they come from."""

    parts: Parts
    config: dict[str, Any]
    folder: Path  # the checkpoint folder of a run of ours, else the path that was given
    scheduler_config: dict[str, Any] | None = None  # diffusers' scheduler_config.json, where there is one


@dataclass
class Stored:
    """A checkpoint whose tensors are still in its files (mapped), and no module is built."""

    states: dict[str, State]  # "unet", "vae", "text_encoder", in our names, as they are stored
    config: dict[str, Any]  # the nodes that build it, and `module`
    folder: Path  # the checkpoint folder of a run of ours, else the path that was given
    scheduler_config: dict[str, Any] | None = None
    tokenizer: Path | None = None
    keep: list[Any] = field(default_factory=list, repr=False)  # what must live as long: a folder of unpacked files


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
        return Stored(states, saved, folder, saved.get("scheduler_config"), tokenizer)
    checkpoint = foreign.read_stored(path, config, weights)
    if whole and set(checkpoint.states) != {"vae"}:
        _complete(checkpoint, path, config, weights)
    nodes = {"module": "latent_diffusion" if "unet" in checkpoint.states else "autoencoder", **checkpoint.config}
    if checkpoint.scheduler_config is not None:
        refuse_nodes(checkpoint.scheduler_config, path)
        nodes |= schedulers.nodes(checkpoint.scheduler_config)
    return Stored(
        checkpoint.states,
        only_allowed(nodes, path),
        path,
        checkpoint.scheduler_config,
        checkpoint.tokenizer,
        checkpoint.keep,
    )


_CALLED = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder"}


def _complete(checkpoint: foreign.Checkpoint, path: Path, config: str | Path | None, weights: str) -> None:
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
    return open_any(_run_or_folder(Path(config).expanduser()), weights, whole=False)


def _run_or_folder(place: Path) -> Path:
    """Where a run's config.yaml lies, else the path itself."""
    return place.parent if place.is_file() and place.suffix in (".yaml", ".yml") else place


def load_any(path: str | Path, weights: str = "ema", config: str | Path | None = None) -> Loaded:
    """Parts of a checkpoint in anybody's layout. ConfigError says what is wrong with it."""
    stored = open_any(path, weights, config)
    parts = build_parts(stored.config, stored.tokenizer)
    fill_parts(parts, stored.states, stored.folder)
    attach_adapters(stored.config, parts, stored.states, stored.folder)
    return Loaded(parts, stored.config, stored.folder, stored.scheduler_config)


def as_ours(values: Mapping[str, Any]) -> Path:
    """The checkpoint folder of ours for checkpoint=, in anybody's layout: converted into outputs/stages once.

    values: a configuration's checkpoint, weights, config and outputs. Processes that ask for the same take turns.
    """
    path, weights, config = values["checkpoint"], values["weights"], values["config"]
    place = Path(path).expanduser()
    if foreign.kind(path) == "ldm":
        return find(place)
    sources = [place] if config is None else [place, Path(config).expanduser()]  # parts may come from the latter
    stamps = [stamp for source in sources for stamp in _stamps(source)]
    fingerprint = hashlib.sha256(repr((str(path), weights, str(config), stamps)).encode()).hexdigest()[:8]
    target = Path(values["outputs"]) / "stages" / f"checkpoint-{fingerprint}"
    with alone(values["outputs"], "checkpoint"):
        if not target.is_dir():
            save_any(load_any(path, weights, config), target, "ldm")
    return target


def _stamps(place: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of the files of a checkpoint; of a run of ours its newest one's. [] for a hub id."""
    place = _run_or_folder(place)
    if place.is_dir() and is_ours(place):
        place = find(place)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def adopted(folder: Path) -> dict[str, Any]:
    """The nodes that a run takes over from a checkpoint folder of ours, so that its parts fit as they are."""
    saved = read_config(folder)
    missing = [k for k in DIFFUSION_NODES if k not in saved]
    if missing:
        raise ConfigError(
            f"checkpoint={folder} is no latent diffusion model (it has no {missing[0]}): adopt=true needs a whole one."
        )
    check_stored(saved, load_parts(folder), folder)
    nodes = {k: dict(saved[k]) for k in DIFFUSION_NODES}
    for node in nodes.values():
        if "pretrained" in node:
            node["pretrained"] = None  # the checkpoint has the weights
    return {**nodes, "image_size": saved.get("image_size"), "scheduler_config": saved.get("scheduler_config")}


def save_any(loaded: Loaded, path: str | Path, format: str, dtype: str = "float32") -> None:
    """Writes "ldm" (a checkpoint folder of ours), "diffusers" (a folder) or "compvis" (one .safetensors or .ckpt).

    LoRAs are worked into the weights. ConfigError for what the format cannot carry, and for a path that exists or
    cannot be written.
    """
    base = replace(loaded, config={k: v for k, v in loaded.config.items() if k != "adapter"})
    save_states(base, merged_states(loaded.parts), path, format, dtype)


def save_states(
    loaded: Loaded, states: dict[str, State], path: str | Path, format: str, dtype: str = "float32"
) -> None:
    """`save_any` with other tensors than the modules', which may be on the meta device."""
    path = Path(path)
    check_target(path, format, dtype)
    try:
        if format == "ldm":
            text = yaml.safe_dump({**loaded.config, "scheduler_config": loaded.scheduler_config}, sort_keys=False)
            encoder = loaded.parts.text_encoder
            save_tokenizer = None if encoder is None else encoder.save_tokenizer
            write(path, Content(states, {}, {"global_step": 0}, text, (), save_tokenizer), step=0)
        else:
            with _tokenizer(loaded.parts) as words:
                foreign.write(_described(loaded, states, words), path, format, dtype)
    except OSError as error:
        raise ConfigError(f"output={path}: cannot be written ({error.strerror or error}).") from error


def check_carries(loaded: Loaded, format: str) -> None:
    """ConfigError that names what the format cannot carry; the modules may be on the meta device."""
    if format != "ldm":
        states = {k: dict(v.state_dict()) for k, v in loaded.parts.modules().items()}
        with _tokenizer(loaded.parts) as words:
            foreign.check(_described(loaded, states, words), format)


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
def _tokenizer(parts: Parts) -> Iterator[Path | None]:
    """A folder with the text encoder's words, for as long as it is needed; None where there is no text encoder."""
    with tempfile.TemporaryDirectory() as folder:
        if parts.text_encoder is None:
            yield None
        else:
            parts.text_encoder.save_tokenizer(folder)
            yield Path(folder)


def _described(loaded: Loaded, states: dict[str, State], words: Path | None) -> foreign.Checkpoint:
    """The model as other programs' formats take it."""
    config, described = loaded.config, loaded.scheduler_config
    if described is None and "scheduler" in config:
        described = schedulers.scheduler_config(config["scheduler"], config["parameterization"])
    nodes: dict[str, Any] = {
        k: config[k] for k in ("model", "autoencoder", "text_encoder", "image_size") if k in config
    }
    return foreign.Checkpoint(nodes, states, described, words)
