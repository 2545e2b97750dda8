"""Sweeps as figures: every arm, differences from a baseline, and which axis mattered."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ldm.analysis.figures import SEEN_ON_BOTH, plain
from ldm.analysis.replicates import default_metric, keys_of, metrics_of, read_results, settings
from ldm.errors import ConfigError, nearest

Sweep = pd.DataFrame | str | Path  # of `read_results`, or a sweep's folder
LEVELS = 6  # values of an axis that are levels of their own: more numbers than that are cut at their quartiles
SPREAD = 0.06  # of the height: how far arms of one level lie apart, by their value
REST = "interactions and chance"


def plot_sweep_parallel(sweep: Sweep, metric: str | None = None) -> Figure:
    """Parallel coordinates: a line an arm through what it was given, to its value of the metric, which colours it.

    Grey and dashed: arms without a value, up to what they were given last. metric: by default val/loss, or a score.

    >>> plot_sweep_parallel("outputs/quickstart-sweep-642aed")
    """
    results, metric = _read(sweep, metric)
    axes_names = swept(results)
    value = _values(results, metric)
    known = value[value.notna()]
    places = [_places(results[name]) for name in axes_names] + [_places(known, levels=0)]
    figure = Figure(figsize=(1.6 + 1.5 * len(places), 3.8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colour = ScalarMappable(Normalize(known.min(), known.max()), SEEN_ON_BOTH)
    spread = (value.rank(method="first").fillna(0) / max(len(value), 1) - 0.5) * SPREAD  # or arms would lie on others
    few = [results[name].nunique() <= LEVELS for name in axes_names]
    for arm in results.index:
        heights = [place[arm] + spread[arm] * some for (place, _), some in zip(places[:-1], few, strict=True)]
        if arm in known.index:
            axes.plot([*heights, places[-1][0][arm]], color=colour.to_rgba(known[arm]), alpha=0.85, label=f"_{arm}")
        else:
            axes.plot(heights, color="grey", linestyle="--", marker="x", markevery=[-1], alpha=0.7, label=f"_{arm}")
    for x, (_, ticks) in enumerate(places):
        axes.axvline(x, color="grey", linewidth=0.8, zorder=0, label="_axis")
        for height, text in ticks:
            axes.annotate(plain(text), (x, height), (4, 6), textcoords="offset points", fontsize="small")
    axes.set_xticks(range(len(places)), labels=[plain(_short(name)) for name in (*axes_names, metric)])
    axes.set(yticks=[], ylim=(-0.06, 1.1), xlim=(-0.35, len(places) - 0.45))
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def plot_differences(sweep: Sweep, metric: str | None = None, baseline: str | None = None) -> Figure:
    """Each setting's difference from the baseline, paired by seed, with its 95 % interval.

    Full dots leave out 0, all intervals holding together (`settings` says how). A setting of one seed has no interval.

    >>> plot_differences("outputs/sweep", "val/loss", baseline="scheduler=cosine")
    """
    results, metric = _read(sweep, metric)
    table = settings(results, metric, baseline)
    figure = Figure(figsize=(6.5, 1.2 + 0.34 * len(table)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="grey", linewidth=1, label="_zero")
    labels = []
    for y, row in enumerate(table.to_dict("records")):
        middle, low, high = (float(row[k]) for k in ("difference", "difference/low", "difference/high"))
        failed = f", {row['failed']} without a value" if row["failed"] else ""
        labels.append(plain(f"{row['setting']}{' (baseline)' if row['baseline'] else ''}{failed}"))
        if math.isfinite(middle):
            error = [[middle - low], [high - middle]] if math.isfinite(low) else None
            face = "C0" if row["distinct"] else "none"
            axes.errorbar(middle, y, xerr=error, fmt="o", color="C0", markerfacecolor=face, capsize=3, label=f"_{y}")
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.set(xlabel=plain(f"{metric}, difference from the baseline"), ylim=(len(table) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    return figure


def importance(sweep: Sweep, metric: str | None = None) -> pd.DataFrame:
    """How much of the variance of a metric over the arms each axis explains by its main effect: axis, levels, share.

    The functional ANOVA of Hutter et al. (2014) on the observed table instead of a forest: of each axis, seed among
    them, the variance between the means of its levels, less what chance alone would give (epsilon squared, Kelley
    1935; chance is what all main effects together leave over). The last row is that rest. A number with more than 6
    values is cut at its quartiles. Exact for a full grid; where axes were drawn together, as a sweeper's search does,
    shares of axes that went along with one another cannot be told apart.
    """
    results, metric = _read(sweep, metric)
    values = _values(results, metric).dropna()
    rows = results.loc[values.index]
    axes = {name: _levels(rows[name]) for name in swept(rows)}
    y = values.to_numpy() - values.mean()
    total = float((y**2).sum())
    sizes = {name: int(codes.max()) + 1 for name, codes in axes.items()}
    design = np.concatenate([np.ones((len(y), 1)), *(np.eye(sizes[n])[c][:, 1:] for n, c in axes.items())], axis=1)
    rank = int(np.linalg.matrix_rank(design))
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    chance = float(((y - fitted) ** 2).sum()) / (len(y) - rank) if len(y) > rank else 0.0
    shares = {}
    for name, codes in axes.items():
        means = pd.Series(y).groupby(codes).transform("mean").to_numpy()
        between = float((means**2).sum()) - (sizes[name] - 1) * chance
        shares[name] = max(between, 0.0) / total if total > 0 else 0.0
    shares[REST] = max(1 - sum(shares.values()), 0.0) if total > 0 else 0.0
    table = [(name, sizes.get(name), share) for name, share in shares.items()]
    return pd.DataFrame(table, columns=["axis", "levels", "share"]).astype({"levels": "Int64"})


def plot_importance(sweep: Sweep, metric: str | None = None) -> Figure:
    """The shares of `importance` as bars."""
    results, metric = _read(sweep, metric)
    table = importance(results, metric)
    figure = Figure(figsize=(6.5, 1.1 + 0.34 * len(table)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colours = ["grey" if name == REST else "C0" for name in table["axis"]]
    axes.barh(range(len(table)), table["share"], color=colours)
    axes.set_yticks(range(len(table)), labels=[plain(name) for name in table["axis"]])
    axes.set(xlabel=plain(f"share of the variance of {metric}"), xlim=(0, 1), ylim=(len(table) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    return figure


def swept(results: pd.DataFrame) -> list[str]:
    """The keys, seed among them, that were not the same in all arms."""
    return [name for name in keys_of(results) if results[name].nunique(dropna=False) > 1]


def _read(sweep: Sweep, metric: str | None) -> tuple[pd.DataFrame, str]:
    results = sweep if isinstance(sweep, pd.DataFrame) else read_results(sweep)
    known = metrics_of(results)
    metric = metric or default_metric(results)
    if metric is None or metric not in known or _values(results, metric).dropna().empty:
        said = f"{metric} has no value in any arm" if metric in known else f"{metric} is not among its metrics"
        raise ConfigError(f"the sweep cannot be drawn: {said}.{nearest(str(metric), known)}")
    if not swept(results):
        raise ConfigError("the sweep cannot be drawn: all of its arms were given the same.")
    return results, metric


def _values(results: pd.DataFrame, metric: str) -> pd.Series:
    """Finite values of the arms that finished."""
    values = results[metric].astype(float).where(results["state"] == "finished")
    return values.where(np.isfinite(values))


def _places(column: pd.Series, levels: int = LEVELS) -> tuple[pd.Series, list[tuple[float, str]]]:
    """Heights from 0 to 1, and what stands at some of them: numbers by size (positive ones over decades by logarithm),
    all else by level."""
    if pd.api.types.is_numeric_dtype(column):
        wide = column.min() > 0 and column.max() > 30 * column.min()
        size = np.log(column) if wide else column.astype(float)
        low, high = size.min(), size.max()
        heights = (size - low) / (high - low) if high > low else size * 0 + 0.5
        ends = (column.min(), column.max())
        few = column.nunique() <= levels
        return heights, sorted(
            {(float(h), f"{v:.4g}") for h, v in zip(heights, column, strict=True) if few or v in ends}
        )
    names = list(dict.fromkeys(column.astype(str)))
    step = 1 / max(len(names) - 1, 1)
    heights = column.astype(str).map({name: i * step for i, name in enumerate(names)})
    return heights, [(i * step, name or "(default)") for i, name in enumerate(names)]


def _levels(column: pd.Series) -> np.ndarray:
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > LEVELS:
        column = pd.qcut(column, 4, duplicates="drop")
    return pd.factorize(column.astype(str))[0]


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]
