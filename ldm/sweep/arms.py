"""A sweep's arms: each in a directory of its own, each a row of one table, whatever became of it."""

from __future__ import annotations

import csv
import fcntl
import gc
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ldm.config.root import digest
from ldm.errors import ConfigError, Ended, NotFinite, SweepError, nearest
from ldm.launch import OtherProcess, is_first

ROWS, TABLE, TRACEBACK = "results.jsonl", "results.csv", "traceback.txt"
FAILED = 3  # exit code of a sweep in which an arm failed, as of a run that diverged
UNKNOWN = "*"  # among metrics' names: something of the user's own measures what cannot be known beforehand
LOWER_IS_BETTER = ("loss", "error", "distance", "nearest", "kl", "commitment", "seconds")  # words of metrics' names


@dataclass
class Arm:
    """One choice of what a sweep sweeps.

    overrides: the arm's command line, as Hydra composed it. fixed: keys that are the same in every arm.
    """

    handed: ClassVar[Arm | None] = None  # to a process of an arm that composes nothing itself

    sweep: Path
    overrides: list[str]
    fixed: list[str] = field(default_factory=list)

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
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        if cls.handed is not None:
            return cls.handed
        if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
            return None
        hydra = HydraConfig.get()
        return cls(
            Path(hydra.sweep.dir), list(hydra.overrides.task), list(hydra.job.config.override_dirname.exclude_keys)
        )


def run_arm(arm: Arm, task: Callable[[], dict[str, float]], optimized: str | None) -> float | None:
    """Runs an arm and records what became of it; its value for the sweeper, None where it has none.

    What is wrong with one arm is a row; Ctrl-C, a scheduler's signal and a SweepError end the sweep.
    """
    from ldm.training.distributed.processes import another_can_follow

    try:
        metrics = task()
    except SweepError as error:
        raise Ended(error) from None
    except OtherProcess as other:
        state = {1: "failed", 2: "refused", FAILED: "failed"}.get(other.exit_code, "interrupted")
        record(arm, state, {}, str(other))
        return None if state != "interrupted" and another_can_follow() else _end(other)
    except ConfigError as error:
        if isinstance(error, NotFinite):
            _record_failure(arm, error)
        else:
            record(arm, "refused", {}, str(error))
            print(f"refused: {' '.join(arm.changes)}: {error}", file=sys.stderr)
        return None if another_can_follow() else _end(error)
    except Exception as error:
        if hasattr(error, "exit_code"):  # training.callbacks.saving.Interrupted
            record(arm, "interrupted", {}, str(error))
            _end(error)
        _record_failure(arm, error)
        return None if another_can_follow() else _end(error)
    except BaseException as stop:
        by = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "a scheduler's signal"
        record(arm, "interrupted", {}, f"stopped by {by}")
        raise
    finally:
        gc.collect()  # a trainer and its module hold each other, and with them the device's memory
    (arm.directory / TRACEBACK).unlink(missing_ok=True)  # of an earlier time
    record(arm, "finished", metrics, "")
    return _value(arm, metrics, optimized)


def _end(error: Exception) -> NoReturn:
    raise Ended(error) from None


def _record_failure(arm: Arm, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    arm.directory.mkdir(parents=True, exist_ok=True)
    file = arm.directory / TRACEBACK
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    record(arm, "failed", {}, reason)
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


def record(arm: Arm, state: str, metrics: dict[str, float], message: str) -> None:
    """Adds an arm's row and writes the table anew; arms that run side by side take turns. A repeated arm replaces."""
    from ldm.training.run.directory import in_json

    if not is_first():
        return
    arm.sweep.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"overrides": arm.overrides, "directory": str(arm.directory), "state": state}
    row = in_json({**row, "metrics": metrics, "message": message})
    with (arm.sweep / ROWS).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()
        file.seek(0)
        rows = {r["directory"]: r for r in map(json.loads, file)}
        _write_table(arm.sweep / TABLE, list(rows.values()))


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    given = [{o.partition("=")[0]: o.partition("=")[2] for o in r["overrides"]} for r in rows]
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


class SweepEnd(Callback):
    """Hydra's hooks around a sweep: says at its end where its table is, which arm is best, and which ones failed."""

    def __init__(self) -> None:
        self._before = 0  # bytes of the rows of earlier sweeps into the same directory

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        rows = Path(config.hydra.sweep.dir) / ROWS
        self._before = rows.stat().st_size if rows.is_file() else 0

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir)
        if not is_first() or not (sweep / ROWS).is_file():  # another's last row may not be there yet
            return
        with (sweep / ROWS).open("rb") as file:
            file.seek(self._before)
            rows = {r["directory"]: r for r in map(json.loads, file)}
        if config.optimized_metric:
            direction = OmegaConf.select(config, "hydra.sweeper.direction")
            print(best_arm(list(rows.values()), config.optimized_metric, getattr(direction, "name", direction)))
        print(f"table: {sweep / TABLE}")
        failed = sum(r["state"] == "failed" for r in rows.values())
        if failed:
            print(f"{failed} of {len(rows)} arms failed, see the table.", file=sys.stderr)
            raise SystemExit(FAILED)
        if rows and all(r["state"] == "refused" for r in rows.values()):
            print(f"all {len(rows)} arms were refused.", file=sys.stderr)
            raise SystemExit(2)


def best_arm(rows: list[dict[str, Any]], metric: str, direction: str | None = None) -> str:
    """One line; direction: the sweeper's, "minimize" or "maximize"; None goes by the metric's name."""
    lower = direction == "minimize" if direction else any(w in metric for w in LOWER_IS_BETTER)
    scored = [r for r in rows if r["metrics"].get(metric) is not None]
    if not scored:
        return f"no arm has a value of {metric}"
    best = (min if lower else max)(scored, key=lambda r: r["metrics"][metric])
    return f"best arm ({'lowest' if lower else 'highest'} {metric}, {best['metrics'][metric]:.6g}): {best['directory']}"
