"""What is made once and shared by all runs, in outputs/stages: by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.checkpoints.folder import find
from ldm.checkpoints.load import load_any, run_or_folder
from ldm.checkpoints.save import save_any
from ldm.errors import ConfigError
from ldm.formats import checkpoint as foreign
from ldm.formats.kinds import is_ours


def to_native(values: Mapping[str, Any]) -> Path:
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
    place = run_or_folder(place)
    if place.is_dir() and is_ours(place):
        place = find(place)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@contextmanager
def alone(outputs: str | Path, stage: str) -> Iterator[None]:
    """One process at a time: arms of a sweep and ranks of a job wait, then find the result there."""
    folder = Path(outputs) / "stages"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{stage}.lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}): give another outputs= folder.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
