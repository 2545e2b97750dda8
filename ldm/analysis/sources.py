"""What a name or a pattern stands for: run directories, sweeps, W&B's offline files, W&B's server."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ldm.analysis.logged import Logged, Scalars
from ldm.analysis.run import Run, is_run
from ldm.analysis.wandb_runs import SCHEME, WandbRun, is_offline_run, online_runs

Source = Logged | str | Path


@dataclass
class Found:
    """What stands behind a pattern.

    without_run: of every arm of a sweep that left no run, its row and the choices that it was given.
    """

    runs: list[Logged] = field(default_factory=list)
    without_run: list[tuple[Scalars, Scalars]] = field(default_factory=list)


def as_run(source: Source) -> Logged:
    """A run, by its object, directory, W&B folder, or address wandb://ENTITY/PROJECT/ID."""
    if isinstance(source, Logged):
        return source
    if str(source).startswith(SCHEME):
        return WandbRun.online(str(source))
    path = Path(source)
    return WandbRun.offline(path) if not is_run(path) and is_offline_run(path) else Run(path)


def find(pattern: str | Path) -> Found:
    """All runs that a pattern names, in the order of their names."""
    if str(pattern).startswith(SCHEME):
        return Found(online_runs(str(pattern)))
    found = Found()
    for path in sorted(map(Path, glob.glob(str(pattern)))):
        if is_run(path):
            found.runs.append(Run(path))
        elif (path / "results.csv").is_file():
            found.runs += [Run(arm) for arm in sorted(path.iterdir()) if is_run(arm)]
            found.without_run += _without_run(path)
        elif is_offline_run(path):
            found.runs.append(WandbRun.offline(path))
    return found


def _without_run(sweep: Path) -> Iterable[tuple[Scalars, Scalars]]:
    with (sweep / "results.csv").open(newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    arms = [dict(zip(head, line, strict=True)) for line in lines]
    swept = [k for k in head[: head.index("state")] if len({arm[k] for arm in arms}) > 1]
    for arm in arms:
        if arm["state"] != "finished" and not is_run(sweep / Path(arm["directory"]).name):
            given = {k: arm[k] for k in swept if arm[k]}
            name = " ".join(f"{k}={v}" for k, v in given.items())
            known: Scalars = {k: arm[k] for k in ("experiment", "seed", "message") if k in arm}
            yield {"path": sweep, "name": name, "state": arm["state"], **known}, given
