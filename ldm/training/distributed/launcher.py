"""The processes of one host, started and watched by the command itself: no torchrun is needed for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.launch import BEGAN, HANDED, PARENT, STARTED, OtherProcess

GRACE = 15.0  # seconds for the others to end by themselves after one has crashed; they know in two or three
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Launcher:
    """Starts `python -m ldm.launched JOB` as often as the trainer asks for, and ends as the first of them does.

    The processes compose nothing: they read the configuration that this command has, an arm of a sweep too. Signals to
    this process go on to them; none outlives it.
    max_restarts: how often all are started anew after one was killed or failed. Not after a refusal, a run that
        diverged, a signal or max_hours.
    """

    def __init__(self, max_restarts: int = 0):
        if max_restarts < 0:
            raise ConfigError(f"launcher.max_restarts={max_restarts}: at least 0, which starts nothing again.")
        self.max_restarts = max_restarts

    def run(self, job: Mapping[str, Any], processes: int, devices: Sequence[int] = ()) -> dict[str, float]:
        """The first process's numbers. devices: of the GPUs, those that are used; none: the first ones.

        Raises OtherProcess with a process's line and exit code, said already, where they ended otherwise.
        """
        restarts = 0
        while True:
            with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
                (Path(folder) / "job.json").write_text(json.dumps(job, default=str))
                ended = _Host(Path(folder), processes, devices).ended()
            if not ended["crashed"]:
                if ended["code"] == 0:
                    return ended["metrics"]
                raise OtherProcess(ended["line"], ended["code"], True, ended.get("ends_sweep", False))
            if restarts == self.max_restarts:
                raise OtherProcess(ended["line"], ended["code"], told_here=False)
            restarts += 1
            print(f"restart {restarts} of {self.max_restarts}: {ended['line']}", file=sys.stderr, flush=True)


class _Host:
    """The processes while they live."""

    def __init__(self, folder: Path, processes: int, devices: Sequence[int]):
        self.folder, self.signalled = folder, False
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
        shared = {**os.environ, "WORLD_SIZE": str(processes), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(port), PARENT: str(os.getpid()), BEGAN: str(STARTED)}
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        if devices and processes > 1:
            visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
            shared["CUDA_VISIBLE_DEVICES"] = ",".join(visible[d] if d < len(visible) else str(d) for d in devices)
        command = [sys.executable, "-m", "ldm.launched", str(folder / "job.json")]
        self.processes: list[subprocess.Popen[bytes]] = []
        with self._signals_passed_on():
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), HANDED: str(folder / f"{rank}.json")}
                # In a session of their own: Ctrl-C in a terminal comes to this process alone, which passes it on once.
                self.processes.append(
                    subprocess.Popen(command, env={**shared, **own}, stdin=subprocess.DEVNULL, start_new_session=True)
                )
            try:
                self._crashed = self._watch()
            finally:
                self._end_all()

    def ended(self) -> dict[str, Any]:
        """code, line and metrics of the first process, and whether one crashed: it may go better another time."""
        if self._crashed is not None:
            rank, status = self._crashed
            killed = f"was killed by {signal.Signals(-status).name}" if status < 0 else "lost another process"
            line = self._said(rank).get("line") or f"rank {rank} {killed}"
            return {"code": 1 if status < 0 else status, "line": line, "crashed": not self.signalled}
        return {"crashed": False, **self._said(0)}

    def _said(self, rank: int) -> dict[str, Any]:
        """What a process said at its end; {} if it was killed before."""
        file = self.folder / f"{rank}.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _watch(self) -> tuple[int, int] | None:
        """Until all have ended: (rank, status) of the first that was killed or failed; the others then have a while."""
        crashed, since = None, 0.0
        while True:
            states = [p.poll() for p in self.processes]
            if crashed is None:
                wrong = [(r, s) for r, s in enumerate(states) if s is not None and self._is_crash(r, s)]
                killed = [(r, s) for r, s in wrong if s < 0]  # rather than those that lost it
                if wrong:
                    crashed, since = (killed or wrong)[0], time.monotonic()
            if None not in states:
                return crashed
            if crashed is not None and time.monotonic() - since > GRACE:
                return crashed
            time.sleep(0.05)

    def _is_crash(self, rank: int, status: int) -> bool:
        """Whether a process ended as none does by itself: killed, by an error that is no refusal, or left alone."""
        return status != 0 and not self._said(rank).get("final")

    def _end_all(self) -> None:
        for kill, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(kill)
            until = time.monotonic() + patience
            while any(p.poll() is None for p in self.processes) and time.monotonic() < until:
                time.sleep(0.05)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """A signal to this process is one to all of them; they agree on the step at which they stop."""

        def pass_on(number: int, frame: Any) -> None:
            self.signalled = True
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(number)

        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, pass_on) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
