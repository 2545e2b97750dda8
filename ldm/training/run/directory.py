"""The directory of one run: who it is, how it stands, what happened."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm import untrusted
from ldm.config.root import digest
from ldm.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} when it is not there or torn."""
    try:
        return untrusted.read_json(path)
    except ConfigError:
        return {}


def write_json(path: Path, value: Any) -> None:
    """In one rename, so that a reader never sees half of it; numbers that JSON has not, as texts."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(in_json(value), indent=1, default=str, allow_nan=False))
    os.replace(part, path)


def in_json(value: Any) -> Any:
    """Nested settings with "nan", "inf" and "-inf" for the numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {k: in_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class RunDirectory:
    """One run's directory. `identity` is what decides its results: a directory of another one is refused."""

    def __init__(self, path: Path, config: dict[str, Any], identity: dict[str, Any]):
        self.path, self.config, self.identity = path, config, identity
        self._lock: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def originals(self) -> Path:
        """Frozen parts as they were before they were cast, for the first checkpoint to link."""
        return self.checkpoints / "frozen"

    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json")

    def open(self) -> None:
        """Creates or re-opens the directory, locks it (once), and writes config.yaml and run.json."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._take_lock()
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.path} ({error.strerror}): give another outputs= folder."
            ) from error
        try:
            self.check_identity()
        except ConfigError:
            self.close()  # or this process, a notebook, would find it in use by itself
            raise
        (self.path / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        nonce = read_json(self.path / "run.json").get("nonce") or secrets.token_hex(4)  # in W&B's id, all its life
        about = {"identity": self.identity, "digest": digest(self.identity), "nonce": nonce, **provenance()}
        write_json(self.path / "run.json", about)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def set_status(self, state: str, step: int, **more: Any) -> None:
        write_json(self.path / "status.json", {"state": state, "step": step, "time": time.time(), **more})

    def event(self, kind: str, **more: Any) -> None:
        line = json.dumps(in_json({"time": time.time(), "event": kind, **more}), default=str)
        with (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            raise ConfigError(
                f"{self.path} is in use by {holder or 'another process'}: wait for it, or give another name=."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def check_identity(self) -> None:
        """ConfigError when the directory holds a run whose results were decided by something else."""
        before = read_json(self.path / "run.json").get("identity")
        if before is None:
            return
        if not isinstance(before, dict) or before.get("form") != self.identity.get("form"):
            raise ConfigError(
                f"{self.path} holds a run of another version of ldm, which wrote down otherwise what decides a run: "
                "give another name=, or delete the directory."
            )
        changed = differences(in_json(before), json.loads(json.dumps(in_json(self.identity), default=str)))
        if changed:
            raise ConfigError(
                f"{self.path} holds a run of another configuration ({'; '.join(changed[:3])}): "
                "give another name=, or delete the directory."
            )


class WritesIntoRun:
    """Mixin of callbacks that write into the run's directory, which `fit` sets; in a plain script there is none."""

    run_directory: RunDirectory | None = None


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """'key: old -> new' for everything in which two plain trees differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        out = []
        for key in sorted(before.keys() | after.keys()):
            out += differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return out
    return [] if before == after else [f"{path}: {before} -> {after}"]


def provenance() -> dict[str, Any]:
    """Versions, git commit, command line and hardware: what a reader needs to believe a number."""
    from importlib.metadata import version

    packages = ("torch", "lightning", "hydra-core", "transformers", "webdataset", "wandb")
    command = os.environ.get("LDM_COMMAND") or shlex.join(sys.argv)
    return {
        # Bytes that are no text would make run.json unreadable, and a run that nobody can tell from another.
        "command": command.encode("utf-8", "backslashreplace").decode(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "hardware": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None
