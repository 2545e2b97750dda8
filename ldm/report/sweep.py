"""The page of a sweep: its settings beside one another."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure

from ldm.analysis.figures import plain, plot_loss
from ldm.analysis.replicates import default_metric, metrics_of, read_results, settings
from ldm.analysis.run import Run, is_run
from ldm.analysis.sweeps import plot_differences, plot_importance, plot_sweep_parallel, swept
from ldm.metrics import AROUND
from ldm.report import page, words

MOST_CURVES, MOST_PICTURES, MOST_METRICS = 10, 24, 12  # of a page
MOST_SETTINGS = 60  # beyond which there is one table, folded
LOSSES = "One seed of each setting. Losses compare only where scheduler, parameterization and weighting are the same."
PARALLEL = "A line an arm through what it was given; grey and dashed: without a value."
DIFFERENCES = "Paired by seed, with 95 % intervals that hold together; a full dot leaves out 0."
IMPORTANCE = "The share of the variance over the arms that each axis explains by itself, less what chance would give."


def write_sweep(path: Path, target: Path | None = None, metric: str | None = None) -> Path:
    """Writes report.html of a sweep's directory, from its files alone; arms may still be running.

    metric: what settings are compared by; by default, and where no arm has it, val/loss or a score.
    """
    results = read_results(path)
    metric = metric if metric in metrics_of(results) else default_metric(results)
    arms = [
        {**row, "run": path / Path(row["directory"]).name, "given": _given(results, row)}
        for row in results.to_dict("records")
    ]
    table = _table(results, metric) if metric else []
    others = [m for m in _scores(results) if m != metric][:MOST_METRICS] if len(table) <= MOST_SETTINGS else []
    one_each = _first_seed(results, arms)
    return page.write(
        target or path / page.NAME,
        "sweep.html",
        name=path.resolve().name,
        introduction=_introduction(results),
        metric=metric or "",
        table=table,
        folded=len(table) > MOST_SETTINGS,
        others=[(other, _table(results, other)) for other in others],
        figures=_figures(results, metric, one_each, len(table)) if metric else [],
        pictures=_pictures(page.Pictures(), one_each),
        failed=[arm for arm in arms if arm["state"] != "finished"],
        arms=[{**arm, "link": _link(arm["run"], target)} for arm in arms],
        command=f"python -m ldm.run task=report {shlex.quote(f'checkpoint={path}')}",
    )


def _introduction(results: pd.DataFrame) -> str:
    axes = [f"{name} ({results[name].nunique(dropna=False)})" for name in swept(results) if name != "seed"]
    seeds = results["seed"].nunique() if "seed" in results else 1
    states = [f"{count} {state}" for state, count in results["state"].value_counts().items()]
    over = f" over {words.listed(axes)}" if axes else ""
    return (
        f"A sweep of {words.count(len(results))} arm{'s' * (len(results) != 1)}{over}, "
        f"with {seeds} seed{'s' * (seeds != 1)}: {words.listed(states)}."
    )


def _table(results: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    """A row a setting, values and differences drawn on scales that all rows share."""
    table = settings(results, metric).to_dict("records")
    values = _scale([row[k] for row in table for k in ("mean", "low", "high")])
    changes = _scale([0.0, *(row[f"difference{k}"] for row in table for k in ("", "/low", "/high"))])
    rows = []
    for row in table:
        change = [float(row[f"difference{k}"]) for k in ("", "/low", "/high")]
        known, compared = math.isfinite(row["mean"]), math.isfinite(change[0]) and not row["baseline"]
        spread = f"{page.number(row['low'])} to {page.number(row['high'])}" if math.isfinite(row["low"]) else ""
        rows.append(
            {
                "setting": row["setting"],
                "value": page.number(row["mean"]) if known else "none",
                "drawn": page.bar(row["mean"], row["low"], row["high"], values) if known else "",
                "said": ", ".join(filter(None, [spread, _of(row)])),
                "change": _changed(row, change),
                "change_drawn": page.bar(change[0], change[1], change[2], changes, 0.0) if compared else "",
                "distinct": bool(row["distinct"]),
            }
        )
    return rows


def _of(row: dict[Any, Any]) -> str:
    failed = f", {row['failed']} without a value" if row["failed"] else ""
    return f"{row['n']} seed{'s' * (row['n'] != 1)}{failed}"


def _changed(row: dict[Any, Any], change: list[float]) -> str:
    if row["baseline"]:
        return "baseline"
    if not math.isfinite(change[0]):
        return ""
    interval = f" ({change[1]:+.3g} to {change[2]:+.3g})" if math.isfinite(change[1]) else ""
    return f"{change[0]:+.3g}{interval}"


def _figures(results: pd.DataFrame, metric: str, one_each: list[tuple[str, Run]], count: int) -> list[dict[str, Any]]:
    asked: list[tuple[str, Callable[[], Figure], str, float]] = [
        ("Loss", partial(_losses, one_each[:MOST_CURVES]), LOSSES, 4.2),
        ("Every arm", partial(plot_sweep_parallel, results, metric), PARALLEL, 3.8),
        ("Differences", partial(plot_differences, results, metric), DIFFERENCES, 1.3 + 0.3 * count),
        ("What mattered", partial(plot_importance, results, metric), IMPORTANCE, 2.6),
    ]
    if count > MOST_SETTINGS:
        del asked[2]
    drawn = [(title, page.svg(make, 9.9, height), text) for title, make, text, height in asked]
    return [{"title": t, "svg": s, "text": text, "wide": True} for t, s, text in drawn if s is not None]


def _losses(named: list[tuple[str, Run]]) -> Figure:
    """The arms' curves, under the names of their settings."""
    figure = plot_loss([run for _, run in named], smooth=10)
    names = {plain(run.name): plain(setting) for setting, run in named}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        said = [(names.get(run, run), kind) for run, _, kind in (label.rpartition(", ") for label in labels)]
        axes.legend(handles, [f"{setting}, {kind}" for setting, kind in said], fontsize="x-small")
    return figure


def _first_seed(results: pd.DataFrame, arms: list[dict[Any, Any]]) -> list[tuple[str, Run]]:
    """(setting, run) of one arm of each setting: of the first seed, so that pictures share prompts and noise."""
    found: dict[str, Run] = {}
    for arm in arms:
        if is_run(arm["run"]) and arm.get("seed") == arms[0].get("seed"):
            found.setdefault(_given(results, arm, without=("seed",)), Run(arm["run"]))
    return list(found.items())


def _pictures(embed: page.Pictures, one_each: list[tuple[str, Run]]) -> list[page.Picture]:
    """What the settings draw, or reconstruct, at the same prompts and seeds."""
    found = []
    for setting, run in one_each[:MOST_PICTURES]:
        every = pd.concat([run.pictures("samples"), run.pictures("reconstructions")])
        if len(every):
            step, path = every["step"].iloc[-1], every["path"].iloc[-1]
            found.append(embed.embed(path, f"{setting}, after step {words.count(int(step))}"))
    return [picture for picture in found if picture]


def _scores(results: pd.DataFrame) -> list[str]:
    """Metrics to compare by, the autoencoder's last: not the losses by time, nor what says something of others."""
    names = [m for m in metrics_of(results) if results[m].notna().any() and not m.startswith("train/")]
    names = [m for m in names if "_by_t/" not in m and m.rsplit("/", 1)[-1] not in AROUND]
    names = [m for m in names if not m.endswith(("_standard_error", "gaussian_loss"))]
    return sorted(names, key=lambda m: m.startswith("autoencoder/"))


def _given(results: pd.DataFrame, row: dict[Any, Any], without: Sequence[str] = ()) -> str:
    """What an arm was given that others were not."""
    given = [f"{k}={row[k]}" for k in swept(results) if k not in without and row[k] != ""]
    return " ".join(given) or "as it is"


def _link(run: Path, target: Path | None) -> str:
    """A relative link to an arm's own page; "" where there is none, or this page lies elsewhere."""
    return f"{quote(run.name)}/{page.NAME}" if target is None and (run / page.NAME).is_file() else ""


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """What holds all finite values, with a little room on either side."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    room = 0.06 * (max(known) - min(known)) or 0.5
    return min(known) - room, max(known) + room
