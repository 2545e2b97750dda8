"""What all processes must have in common before anything is built: the command, the programs, one folder of outputs."""

from __future__ import annotations

import hashlib
import platform
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ldm
from ldm.errors import ConfigError
from ldm.launch import is_first
from ldm.training.distributed import processes

LINGERS = 3.0  # seconds that a network's folder may take to show another host's file
PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "webdataset")


def check_hosts(config: Mapping[str, Any]) -> None:
    """ConfigError in all processes, naming what differs, unless each has the same command and sees one outputs=."""
    meeting = processes.met()
    if meeting is None:
        return
    programs = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    processes.agree(
        {"world_size": meeting.here.world_size, "installed": programs, "ldm": _code()},
        "install the same versions on all hosts.",
    )
    processes.agree(config, "type the same command in all processes.")
    _check_shared(Path(config["outputs"]))


def _check_shared(outputs: Path) -> None:
    """The first process leaves a file, and all look for it."""

    def leave() -> list[str]:
        name = f".meeting-{uuid.uuid4().hex}"
        try:
            outputs.mkdir(parents=True, exist_ok=True)
            (outputs / name).write_text("")
        except OSError as error:
            raise ConfigError(f"cannot write to {outputs} ({error.strerror}): give another outputs= folder.") from error
        return [name, str(outputs.resolve())]

    name, place = processes.by_first(leave)
    until = time.monotonic() + LINGERS
    while not (found := (outputs / name).exists()) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        seen = {"outputs": place if found else f"another folder ({outputs.resolve()})"}
        processes.agree(seen, "give one folder that all hosts share, outputs=/shared/outputs.")
    finally:
        if is_first():
            (outputs / name).unlink(missing_ok=True)


def _code() -> str:
    """A fingerprint of this package's files: the same version may be another checkout."""
    root = Path(ldm.__file__).parent
    contents = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        contents.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return contents.hexdigest()[:8]
