"""Checkpoint folders: written whole or not at all, and enough to rebuild the module without anything else.

step-00001000/  unet.safetensors  unet.ema.safetensors  vae.safetensors  text_encoder.safetensors ...
                tokenizer/  state.pt  state/tensors.safetensors  config.yaml  manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.allowed import read_allowed
from ldm.atomic import atomic_write, sync
from ldm.checkpoints.state import FILE as STATE
from ldm.checkpoints.state import parted
from ldm.errors import ConfigError
from ldm.formats.content import DIFFUSION_NODES, State
from ldm.formats.files.open import load
from ldm.formats.files.store import gather, save_tensors
from ldm.untrusted import read_json, shown, whole

FORMAT = 1
_MODULES = ("autoencoder", "latent_diffusion")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass
class Content:
    """What goes into a checkpoint folder."""

    parts: Mapping[str, State]  # part name -> tensors
    averages: Mapping[str, State]  # part name -> averaged tensors of what is trained
    state: dict[str, Any]  # plain data and tensors: optimizer, loops, callbacks
    config: str  # resolved configuration, YAML
    frozen: tuple[str, ...] = ()  # parts that do not change: linked from the folder before
    save_tokenizer: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        self.state, self.of_state = parted(self.state)

    def files(self) -> dict[str, State]:
        """The files of tensors, in the order in which they are written."""
        found = {f"{name}.safetensors": tensors for name, tensors in self.parts.items()}
        found |= {f"{name}.ema.safetensors": tensors for name, tensors in self.averages.items()}
        return found | ({STATE: self.of_state} if self.of_state else {})

    def linked(self, previous: Path | None) -> dict[str, Any]:
        """The files that the folder before has already, as its manifest lists them."""
        there = read_manifest(previous)["files"] if previous and self.frozen else {}
        files = [f"{name}.safetensors" for name in self.frozen if name in self.parts]
        return {file: there[file] for file in files if file in there}

    def take_copies(self, copy: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """From here on what is written is copies, as all is now: of what training changes."""

        def copied(file: str, tensors: State) -> State:
            return {name: copy(f"{file}/{name}", tensor) for name, tensor in tensors.items()}

        self.parts = {n: t if n in self.frozen else copied(n, t) for n, t in self.parts.items()}
        self.averages = {n: copied(f"{n}.ema", t) for n, t in self.averages.items()}
        self.of_state = copied(STATE, self.of_state)
        self.state = deepcopy(self.state)

    def gather(self, linked: Collection[str]) -> None:
        """What the other processes do while the first one writes what they hold shares of."""
        for file, tensors in self.files().items():
            if file not in linked:
                gather(tensors)


def write(folder: Path, content: Content, step: int, previous: Path | None = None) -> None:
    """Writes `folder` under another name, syncs, checks, and renames it: at no moment is it half there."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    known = content.linked(previous)
    for file, tensors in content.files().items():
        if previous is not None and file in known:
            _link(previous / file, part / file)
        else:
            (part / file).parent.mkdir(exist_ok=True)
            save_tensors(tensors, part / file)
    if content.save_tokenizer is not None:
        content.save_tokenizer(part / "tokenizer")
    torch.save(content.state, part / "state.pt")
    (part / "config.yaml").write_text(content.config)
    files = {p.relative_to(part).as_posix(): p for p in sorted(part.rglob("*")) if p.is_file()}
    manifest = {"format": FORMAT, "step": step, "files": {n: known.get(n) or _entry(p) for n, p in files.items()}}
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in [*files.values(), part / "manifest.json", part]:
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    sync(folder.parent)


def take_parts(folder: Path, names: Sequence[str], target: Path) -> None:
    """A checkpoint folder with some parts of another, linked, that verifies as that does; nothing if it is there."""
    if not target.is_dir():
        _derive(folder, lambda file: file == "config.yaml" or file.split(".")[0] in names, target)


def with_averages(folder: Path, averages: Mapping[str, State], target: Path) -> None:
    """A checkpoint folder with other averaged weights, all else linked, to draw and evaluate with: it has no state."""
    stateful = ("state.pt", STATE)
    _derive(folder, lambda file: file not in stateful and not file.endswith(".ema.safetensors"), target, averages)


def _derive(
    folder: Path, keeps: Callable[[str], bool], target: Path, averages: Mapping[str, State] | None = None
) -> None:
    """Links some files of a checkpoint folder into another, beside averages of its own; one that is there goes."""
    manifest = read_manifest(folder)
    files = {name: entry for name, entry in manifest["files"].items() if keeps(name)}
    with atomic_write(target) as part:
        part.mkdir(parents=True)
        for name in files:
            (part / name).parent.mkdir(exist_ok=True)
            _link(folder / name, part / name)
        for name, tensors in (averages or {}).items():
            file = part / f"{name}.ema.safetensors"
            save_tensors(tensors, file)
            files[file.name] = _entry(file)
        (part / "manifest.json").write_text(json.dumps({**manifest, "files": files}, indent=1))
        shutil.rmtree(target, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint folder's modules are rebuilt from, judged: it may be somebody else's."""
    source = folder / "config.yaml"
    config = read_allowed(source)
    module = config.get("module")  # a name in old runs, a node in new ones; converted models have none
    if not (module is None or isinstance(module, dict) or module in _MODULES):
        raise ConfigError(f"{source}: module is {shown(module)}, and it is autoencoder or latent_diffusion.")
    whole = (folder / "unet.safetensors").is_file()
    missing = [k for k in (DIFFUSION_NODES if whole else ("autoencoder",)) if not config.get(k)]
    if missing:
        raise ConfigError(f"{source} has no {missing[0]}, which module={_MODULES[whole]} is rebuilt from.")
    return config


def run_of(folder: Path) -> Path:
    """The run directory of a checkpoint folder; the folder itself where it belongs to none."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, ConfigError when it is not one: files, each with its size and digest."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{folder} is not a checkpoint folder of ours: {error}") from error
    whole(manifest.get("step"), "step", f"{path}", least=0, most=2**62)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files, files.values())):
        raise ConfigError(f"{path} does not list files inside {folder}, each with bytes and sha256: it was edited.")
    return manifest


def _is_entry(name: str, entry: Any) -> bool:
    """Whether an entry of a manifest is one: a path that stays in its folder, as `write` spells it."""
    inside = all(step not in ("", ".", "..") for step in name.split("/")) and "\\" not in name
    size, digest = (entry.get(key) for key in ("bytes", "sha256")) if isinstance(entry, dict) else (None, None)
    return inside and type(size) is int and size >= 0 and isinstance(digest, str)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file has its size and digest."""
    try:
        files = read_manifest(folder)["files"]
    except ConfigError as error:
        return str(error)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        try:
            digest = _sha256(path)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if digest != entry["sha256"]:
            return f"{path} is damaged: its digest is not the one in the manifest"
    return None


def all_folders(directory: Path) -> list[Path]:
    """Finished checkpoint folders of a run directory, oldest first."""
    return sorted(p for p in (directory / "checkpoints").glob("step-*") if p.suffix != ".part" and p.is_dir())


def newest(directory: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that verifies; damaged ones are named and passed over."""
    for folder in reversed(all_folders(directory)):
        problem = verify(folder)
        if problem is None:
            return folder
        warn(f"checkpoint passed over: {problem}")
    return None


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that a run directory, or the folder itself, stands for. ConfigError when there is none."""
    given = Path(path)
    if (given / "manifest.json").is_file() and (given / "config.yaml").is_file():
        problem = verify(given)
        if problem is not None:
            raise ConfigError(f"checkpoint={path}: {problem.rstrip('.')}. Use another step of the run.")
        return given
    if not given.exists():
        raise ConfigError(f"checkpoint={path}: there is nothing at this path. Give a run directory, like outputs/mine.")
    problems: list[str] = []
    folder = newest(given, problems.append)
    if folder is None:
        reason = "; ".join(problems) or "it has no checkpoints/step-* folder"
        raise ConfigError(f"checkpoint={path}: no usable checkpoint there ({reason}).")
    return folder


def load_parts(folder: Path, weights: str = "ema", only: Sequence[str] | None = None) -> dict[str, State]:
    """Tensors of every part (or of those named), the averaged ones where they are asked for and there."""
    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.endswith(".ema.safetensors"):
            continue
        name = file.name.removesuffix(".safetensors")
        if only is not None and name not in only:
            continue
        parts[name] = load(file).tensors
        averaged = folder / f"{name}.ema.safetensors"
        if weights == "ema" and averaged.is_file():
            parts[name].update(load(averaged).tensors)
    return parts


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
