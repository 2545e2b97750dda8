"""A sweep's arms: each in a directory of its own, each a row of one table, whatever became of it."""

from __future__ import annotations

import csv
import fcntl
import gc
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.build import build
from ldm.config.choices import drop_leftovers
from ldm.config.keys import Task
from ldm.config.root import digest
from ldm.config.schema import check_keys_are_read, look_in, problems, task_class
from ldm.errors import ConfigError, Ended, NotFinite, SweepError, nearest
from ldm.launch import OtherProcess, is_first, launch

ROWS, TABLE, TRACEBACK = "results.jsonl", "results.csv", "traceback.txt"
FAILED = 3  # exit code of a sweep in which an arm failed, as of a run that diverged
PRUNED = 4  # of an arm's process
UNKNOWN = "*"  # among metrics' names: something of the user's own measures what cannot be known beforehand


@dataclass
class Arm:
    """One choice of what a sweep sweeps.

    overrides: the arm's command line, as Hydra composed it. fixed: keys that are the same in every arm. number: its
    place among the arms, and in the table.
    """

    handed: ClassVar[Arm | None] = None  # to a process of an arm that composes nothing itself

    sweep: Path
    overrides: list[str]
    fixed: list[str] = field(default_factory=list)
    number: int = 0

    @property
    def changes(self) -> list[str]:
        return [o for o in self.overrides if o.partition("=")[0] not in self.fixed]

    @property
    def directory(self) -> Path:
        """Named by what the arm changes: the same choice is found again, another has another directory."""
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join(o.replace("=", "-") for o in self.changes))[:80]
        return self.sweep / "-".join(filter(None, [slug.strip("-"), digest(sorted(self.changes))]))

    @classmethod
    def current(cls) -> Arm | None:
        """The arm that Hydra runs in this process; None outside a sweep."""
        if cls.handed is not None:
            return cls.handed
        if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
            return None
        hydra = HydraConfig.get()
        fixed = list(hydra.job.config.override_dirname.exclude_keys)
        typed: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${seed} is the same in all arms
        return cls(Path(hydra.sweep.dir), typed, fixed, hydra.job.num)


def ready(config: DictConfig, arm: Arm | None) -> type[Task]:
    """The task of a composed configuration, which is checked, and in a sweep told where and for whom it runs."""
    hydra = HydraConfig.get()
    choices, overrides, task = hydra.runtime.choices, list(hydra.overrides.task), str(hydra.runtime.choices["task"])
    look_in(*(Path(s.path) for s in hydra.runtime.config_sources if s.schema == "file"))  # a launcher's process too
    named = () if arm is None else ("name",)  # of the sweep, whatever its arms do
    check_keys_are_read(task, [o for o in overrides if o.partition("=")[0] not in named])
    kind = task_class(task, config.task._target_)
    drop_leftovers(config, overrides)
    wrong = problems(config, task)  # type: ignore[arg-type]
    if wrong:
        raise ConfigError(" ".join(wrong))
    config.experiment = choices.get("experiment") or task
    search, config.sweep = build(config.sweep, "sweep"), None  # of the command; its arms are told what concerns them
    if arm is None:
        return kind
    if kind.own_folder:  # into one folder they would write over each other
        config.output = str(Path(config.output) / arm.directory.name if config.output else arm.directory)
    with open_dict(config):
        if "group" in (config.logger or {}):  # W&B's
            config.logger.group = config.logger.group or os.environ.get("WANDB_RUN_GROUP") or arm.sweep.name
            tags = config.logger.tags or [t for t in os.environ.get("WANDB_TAGS", "").split(",") if t]
            config.logger.tags = [*tags, *(c[:64] for c in arm.changes)]  # W&B takes no longer ones
        if search is not None:
            search.watch(config, arm)
    return kind


def run_arm(arm: Arm, task: Callable[[], dict[str, float]], config: DictConfig) -> float | None:
    """Runs an arm and records what became of it; its value for the sweeper, None where it has none.

    What is wrong with one arm is a row; Ctrl-C, a scheduler's signal and a SweepError end the sweep.
    """
    optimized, add = config.optimized_metric, partial(record, arm, seed=config.seed)
    try:
        metrics = task()
    except SweepError as error:
        raise Ended(error) from None
    except OtherProcess as other:
        line = " ".join(str(other).removeprefix("error: ").removeprefix("stopped: ").split())[:500]
        if other.ends_sweep:
            raise Ended(OtherProcess(line, other.exit_code, other.told_here)) from None
        state = {1: "failed", 2: "refused", FAILED: "failed", PRUNED: "pruned"}.get(other.exit_code, "interrupted")
        add(state, _last(arm) if state == "pruned" else {}, line)
        if not other.told_here:
            print(f"{state}: {' '.join(arm.changes)}: {line}", file=sys.stderr, flush=True)
        return None if state != "interrupted" and another_can_follow() else _end(other)
    except ConfigError as error:
        if isinstance(error, NotFinite):
            _record_failure(arm, error, add)
        else:
            add("refused", {}, str(error))
            print(f"refused: {' '.join(arm.changes)}: {error}", file=sys.stderr)
        return None if another_can_follow() else _end(error)
    except Exception as error:
        code = getattr(error, "exit_code", None)  # of training.callbacks.saving.Interrupted
        if code == PRUNED:
            add("pruned", _last(arm), str(error))
            print(f"pruned: {' '.join(arm.changes)}: {error}", file=sys.stderr)
            return None if another_can_follow() else _end(error)
        if code is not None:
            add("interrupted", {}, str(error))
            _end(error)
        _record_failure(arm, error, add)
        return None if another_can_follow() else _end(error)
    except BaseException as stop:
        by = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "a scheduler's signal"
        add("interrupted", {}, f"stopped by {by}")
        raise
    finally:
        gc.collect()  # a trainer and its module hold each other, and with them the device's memory
    (arm.directory / TRACEBACK).unlink(missing_ok=True)  # of an earlier time
    add("finished", metrics, "")
    return _value(arm, metrics, optimized)


def another_can_follow() -> bool:
    """Whether the next arm can run: not after an error inside a group of processes, in which others may still wait."""
    if launch().world_size == 1:
        return True
    from ldm.training.distributed import processes

    return processes.another_can_follow()


def _last(arm: Arm) -> dict[str, float]:
    from ldm.training.run.logging import last_metrics

    return last_metrics(arm.directory / "metrics.jsonl")


def _end(error: Exception) -> NoReturn:
    raise Ended(error) from None


def _record_failure(arm: Arm, error: Exception, add: Callable[[str, dict[str, float], str], None]) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    arm.directory.mkdir(parents=True, exist_ok=True)
    file = arm.directory / TRACEBACK
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    add("failed", {}, reason)
    print(f"failed: {' '.join(arm.changes)}: {reason} (traceback: {file})", file=sys.stderr)


def _value(arm: Arm, metrics: dict[str, float], optimized: str | None) -> float | None:
    if not optimized:
        return None
    if optimized not in metrics:
        raise Ended(SweepError(f"{unknown_metric(optimized, metrics)} ({arm.directory} has been trained.)"))
    return metrics[optimized]  # None where it was not finite


def unknown_metric(metric: str, names: Iterable[str], key: str = "optimized_metric") -> str:
    """The line for a metric that is not among `names`."""
    known = sorted(set(names) - {UNKNOWN})
    near = nearest(metric, known)
    usual = [n for n in known if n.count("/") == 1]
    shown = "" if near else f" There is {', '.join(usual[:8])}{' ...' if len(known) > 8 else ''}."
    return f"{key}={metric}: nothing of this name is measured here.{near}{shown}"


def record(arm: Arm, state: str, metrics: dict[str, float], message: str, seed: Any = None) -> None:
    """Adds an arm's row and writes the table anew; arms that run side by side take turns. A repeated arm replaces."""
    from ldm.training.run.directory import in_json

    if not is_first():
        return
    arm.sweep.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {
        "overrides": arm.overrides,
        "directory": str(arm.directory),
        "state": state,
        "seed": seed,
        "number": arm.number,
    }
    row = in_json({**row, "metrics": metrics, "message": message})
    with (arm.sweep / ROWS).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()
        file.seek(0)
        rows = {r["directory"]: r for r in map(json.loads, file)}
        _write_table(arm.sweep / TABLE, sorted(rows.values(), key=lambda r: r.get("number", 0)))


def rows_of(sweep: Path, after: int = 0) -> dict[str, dict[str, Any]]:
    """directory -> row of every arm of a sweep, those alone that were recorded behind so many bytes of the file."""
    file = sweep / ROWS
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        opened.seek(after)
        return {r["directory"]: r for r in map(json.loads, opened)}


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    given = [{o.partition("=")[0]: o.partition("=")[2] for o in r["overrides"]} for r in rows]
    for r, g in zip(rows, given, strict=True):
        if r.get("seed") is not None:
            g.setdefault("seed", str(r["seed"]))
    keys = list(dict.fromkeys(k for g in given for k in g))
    metrics = list(dict.fromkeys(k for r in rows for k in r["metrics"]))
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "state", *metrics, "message", "directory"])
        for r, g in zip(rows, given, strict=True):
            cells = [g.get(k, "") for k in keys]
            values = [r["metrics"].get(m, "") for m in metrics]
            writer.writerow([*cells, r["state"], *values, r["message"], r["directory"]])
    part.replace(path)
