"""An arm in a process of its own: one that is killed, by hand or for want of memory, takes nothing else along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm.config.schema import looked_in
from ldm.launch import BEGAN, HANDED, PARENT, STARTED, OtherProcess, launch
from ldm.sweep.arms import Arm

LOGS = "logs"  # below a sweep's directory: what each arm's process prints
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs arms within this process


def apart() -> bool:
    """Whether this arm is to have a process of its own: under launchers whose workers must outlive it."""
    return launch().world_size == 1 and HydraConfig.get().launcher._target_ != BASIC


class Child:
    """An arm in a process, from its start on: `python -m ldm.launched JOB`, in a session of its own.

    It gets SIGTERM if this process ends, whatever ends it. environment: beside this one's.
    """

    def __init__(self, arm: Arm, config: DictConfig, environment: dict[str, str] | None = None):
        self.arm, self.config = arm, config
        self._folder = tempfile.TemporaryDirectory(prefix="ldm-")
        job, self._ended = Path(self._folder.name) / "job.json", Path(self._folder.name) / "ended.json"
        said = {"config": OmegaConf.to_container(config), "arm": asdict(arm), "folders": looked_in()}
        job.write_text(json.dumps(said, default=str))
        self.log = arm.sweep / LOGS / f"{arm.directory.name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        told = {HANDED: str(self._ended), PARENT: str(os.getpid()), BEGAN: str(STARTED)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ldm.launched", str(job)],
                env={**os.environ, **told, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        print(f"started: {' '.join(arm.changes)} ({self.log})", flush=True)

    def numbers(self) -> dict[str, float]:
        """What the arm gives, at its end; a signal to this process is one to it. OtherProcess where it failed."""
        try:
            status = self.process.wait()
        except BaseException as stop:
            self.send(stop)
            self.wait_or_kill()
            raise
        said: dict[str, Any] = json.loads(self._ended.read_text()) if self._ended.is_file() else {}
        self._folder.cleanup()
        if said and said["code"] == 0:
            return said["metrics"]
        killed = "kill -9, or out of memory" if status == -signal.SIGKILL else f"see {self.log}"
        how = (
            f"killed by signal {-status} ({killed})" if status < 0 else f"ended with exit code {status}, see {self.log}"
        )
        line = said.get("line") or how
        raise OtherProcess(line, said.get("code", 1), told_here=False, ends_sweep=said.get("ends_sweep", False))

    def send(self, stop: BaseException) -> None:
        """Passes on what stops this process: Ctrl-C as such, the rest as SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)

    def wait_or_kill(self) -> None:
        """Until the arm has saved; a second signal to this process kills it."""
        try:
            self.process.wait()
        except BaseException:
            self.process.kill()
            self.process.wait()
