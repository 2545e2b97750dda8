"""Runs `python -m ldm.run` as a person does, and waits for things in its run directory."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONWARNINGS": "ignore"}


def ldm(*arguments: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ldm.run", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, **kwargs)


def here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """What `ldm` gives, in this process: ten times faster. An error that is no refusal is raised."""
    from hydra.core.hydra_config import HydraConfig

    from ldm.run import run

    out, err, typed = io.StringIO(), io.StringIO(), sys.argv
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
    finally:
        sys.argv = typed
        HydraConfig.instance().cfg = None  # what ran here is over
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ldm.run", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def children(pid: int) -> list[int]:
    """The processes that one has started, in that order: of a launcher, by rank."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(") ", 1)[1][0] != "Z"


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """step -> scalars, without what depends on the clock."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {k: v for k, v in record.items() if k not in ("time", "train/images_per_second")}
        assert not set(values) & set(rows.get(record["step"], {})) - {"step", "images"}, "logged twice"
        rows.setdefault(record["step"], {}).update(values)
    return rows


def wait_for(condition, seconds: float = 90.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened in time"
        time.sleep(0.02)
