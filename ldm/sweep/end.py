"""The end of a sweep: which arms failed, which setting is best, and how sure that is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ldm.atomic import atomic_write
from ldm.errors import ConfigError
from ldm.launch import is_first
from ldm.sweep.arms import FAILED, ROWS, TABLE, rows_of

SUMMARY = "summary.csv"
LOWER_IS_BETTER = (  # words of metrics' names
    *("loss", "error", "distance", "nearest", "kl", "commitment", "seconds", "fid", "kid", "lpips"),
)


def is_lower_better(metric: str, direction: str | None = None) -> bool:
    """direction: "minimize" or "maximize"; None goes by the metric's name."""
    return direction == "minimize" if direction else any(w in metric for w in LOWER_IS_BETTER)


class SweepEnd(Callback):
    """Hydra's hooks around a sweep: says at its end where its tables are, what is best, and what failed."""

    def __init__(self) -> None:
        self._before = 0  # bytes of the rows of earlier sweeps into the same directory

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        rows = Path(config.hydra.sweep.dir) / ROWS
        self._before = rows.stat().st_size if rows.is_file() else 0

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir)
        if not is_first() or not (sweep / ROWS).is_file():  # another's last row may not be there yet
            return
        rows = rows_of(sweep, self._before)
        direction = OmegaConf.select(config, "sweep.direction") or OmegaConf.select(config, "hydra.sweeper.direction")
        direction = getattr(direction, "name", direction)
        summarise(sweep, config.optimized_metric, direction)
        if config.optimized_metric:
            print(best_arm(list(rows_of(sweep).values()), config.optimized_metric, direction))
        print(f"table: {sweep / TABLE}")
        report(sweep, config.optimized_metric)
        failed = sum(r["state"] == "failed" for r in rows.values())
        if failed:
            print(f"{failed} of {len(rows)} arms failed, see the table.", file=sys.stderr)
            raise SystemExit(FAILED)
        if rows and all(r["state"] == "refused" for r in rows.values()):
            print(f"all {len(rows)} arms were refused.", file=sys.stderr)
            raise SystemExit(2)


def report(sweep: Path, metric: str | None) -> None:
    """The sweep's page; where it cannot be written, a line: the table is there."""
    from ldm.report.sweep import write_sweep

    try:
        print(f"report: {write_sweep(sweep, metric=metric)}")
    except (ConfigError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)


def summarise(sweep: Path, metric: str | None, direction: str | None = None) -> None:
    """Prints the settings over their seeds, a frame of `ldm.analysis.settings`, and the best one; writes a file."""
    from ldm.analysis.replicates import default_metric, metrics_of, read_results, settings

    results = read_results(sweep)
    metric = metric or default_metric(results)
    if metric is None or metric not in metrics_of(results):
        return
    table = settings(results, metric)
    with atomic_write(sweep / SUMMARY) as part:
        table.to_csv(part, index=False)
    if len(table) > 1 or table["n"].max() > 1:
        _show(table, metric)
        print(verdict(table, metric, direction))
        print(f"settings: {sweep / SUMMARY}")


def _show(table: Any, metric: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{metric} over seeds, 95 % intervals", title_justify="left")
    for name in ("setting", "n", "failed", "mean", "interval", "difference", "all of them within", "distinct"):
        shown.add_column(name, justify="left" if name in ("setting", "distinct") else "right", overflow="fold")
    for row in table.to_dict("records"):
        difference = ("baseline", "", "") if row["baseline"] else _cells(row, "difference")
        yes = "" if row["baseline"] else "yes" if row["distinct"] else "no"
        mean, within = _number(row["mean"]), _within(row["low"], row["high"])
        shown.add_row(row["setting"], str(row["n"]), str(row["failed"]), mean, within, *difference[:2], yes)
    console = Console(file=sys.stdout)
    console.print(shown) if console.is_terminal else Console(file=sys.stdout, width=140).print(shown)


def _cells(row: dict[str, Any], name: str) -> tuple[str, str]:
    return _number(row[name], "+"), _within(row[f"{name}/low"], row[f"{name}/high"], "+")


def _number(value: float, sign: str = "") -> str:
    return "" if value != value else f"{value:{sign}.4g}"


def _within(low: float, high: float, sign: str = "") -> str:
    return "" if low != low else f"[{low:{sign}.4g}, {high:{sign}.4g}]"


def verdict(table: Any, metric: str, direction: str | None = None) -> str:
    """One line: the best setting of `ldm.analysis.settings`, and whether its seeds tell it from the baseline."""
    lower = is_lower_better(metric, direction)
    scored = table[table["n"] > 0]
    if scored.empty:
        return f"no setting has a value of {metric}"
    means = scored["mean"]
    best = scored.loc[means.idxmin() if lower else means.idxmax()]
    seeds = f"{best['n']} seed{'s' if best['n'] > 1 else ''}"
    within = f" {_within(best['low'], best['high'])}" if best["n"] > 1 else ""
    extreme = f"{'lowest' if lower else 'highest'} {metric}, {best['mean']:.6g}{within}, {seeds}"
    line = f"best setting ({extreme}): {best['setting']}"
    baseline = table.loc[table["baseline"].idxmax(), "setting"]
    difference, within = _cells(best.to_dict(), "difference")
    if len(table) == 1:
        return line
    if best["baseline"]:
        worse = int(table["distinct"].sum())
        return f"{line}, the baseline; {worse} of the other {len(table) - 1} can be told from it"
    if best["distinct"]:
        return f"{line}; from the baseline, {baseline}: {difference} {within}"
    if not within:
        return f"{line}; whether it is better than {baseline} takes two seeds that both have: seed=0,1,2"
    return f"{line}; not distinguishable from the baseline, {baseline}: {difference} {within}"


def best_arm(rows: list[dict[str, Any]], metric: str, direction: str | None = None) -> str:
    """One line; direction: "minimize" or "maximize"; None goes by the metric's name."""
    lower = is_lower_better(metric, direction)
    scored = [r for r in rows if r["metrics"].get(metric) is not None and r.get("state") != "pruned"]
    if not scored:
        return f"no arm has a value of {metric}"
    best = (min if lower else max)(scored, key=lambda r: r["metrics"][metric])
    return f"best arm ({'lowest' if lower else 'highest'} {metric}, {best['metrics'][metric]:.6g}): {best['directory']}"
