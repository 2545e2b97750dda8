"""Settings of a sweep over their seeds: means with intervals, and paired differences from a baseline.

Arms that differ in nothing but seed= are replicates of one setting. Arms of one seed see the same noise, data order and
initial weights, so settings are compared seed by seed: what a seed does to both falls out of the difference.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.errors import ConfigError, nearest

LEVEL = 0.95  # of every interval here
BESIDE = ("seed", "sweep", "name", "outputs", "optimized_metric")  # keys that make no setting, though commands differ


def read_results(path: str | Path) -> pd.DataFrame:
    """results.csv of a sweep (the file or its folder): what was typed, seed, state, metrics, message, directory.

    Metrics are numbers, NaN where an arm has none; a key is a column of numbers where all of its values are.
    ConfigError for a file that is missing, cut, or of something else.
    """
    file = Path(path) / "results.csv" if Path(path).is_dir() else Path(path)
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.reader(opened))
    except FileNotFoundError:
        raise ConfigError(f"{file} is not there: give a sweep's folder, outputs/<sweep>, or its results.csv.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{file} cannot be read ({' '.join(str(error).split())}): give a sweep's results.csv."
        ) from None
    head = rows[0] if rows else []
    if not {"state", "message", "directory"} <= set(head):
        raise ConfigError(f"{file} is no table of a sweep: it has no columns state, message and directory.")
    cut = next((n for n, row in enumerate(rows[1:], 2) if len(row) != len(head)), None)
    if cut:
        raise ConfigError(f"{file} is cut in line {cut}: the sweep's command, typed again, writes it anew.")
    frame = pd.DataFrame(rows[1:], columns=head, dtype=object)
    for name in metrics_of(frame):
        frame[name] = pd.to_numeric(frame[name].replace("", math.nan), errors="coerce").astype(float)
    for name in keys_of(frame):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        if len(frame) and numbers.notna().all():
            frame[name] = numbers
    return frame


def keys_of(results: pd.DataFrame) -> list[str]:
    """Names of the columns that say what was typed; seed is one of them."""
    names = list(results.columns)
    return names[: names.index("state")]


def metrics_of(results: pd.DataFrame) -> list[str]:
    """Names of the columns of numbers."""
    names = list(results.columns)
    return names[names.index("state") + 1 : names.index("message")]


def default_metric(results: pd.DataFrame) -> str | None:
    """val/loss where it was measured, else the first score; None where nothing was."""
    names = [n for n in metrics_of(results) if results[n].notna().any()]
    scores = [n for n in names if not n.startswith(("train/", "autoencoder/"))]
    return "val/loss" if "val/loss" in names else next(iter([*scores, *names]), None)


def settings(results: pd.DataFrame, metric: str, baseline: str | None = None) -> pd.DataFrame:
    """One row a setting, in the order of the arms.

    results: of `read_results`. metric: a column of it. baseline: a `setting`; by default the first that has a value.

    Columns: setting, what differs in short ("scheduler=cosine"); the swept columns; n, seeds with a value; failed, arms
    without one, whatever the reason; mean, low, high (95 % of Student's t over seeds, NaN with a single one);
    difference from the baseline over the seeds that both have, difference/low, difference/high; distinct; baseline.

    The intervals of all differences hold together with 95 %, whichever setting is made the baseline after a look at
    the table (Bonferroni's correction for all pairs of settings). distinct says that one leaves out 0: of tables in
    which nothing differs, at most 5 % name any.
    ConfigError for a metric or baseline that is not there.
    """
    if metric not in metrics_of(results):
        raise ConfigError(f"{metric} is not among the sweep's metrics.{nearest(metric, metrics_of(results))}")
    keys = [k for k in keys_of(results) if k.split(".")[0] not in BESIDE]
    swept = [k for k in keys if results[k].nunique(dropna=False) > 1]
    groups = list(results.groupby(swept, sort=False, dropna=False)) if swept else [((), results)]
    labels = [_label(swept, values) for values, _ in groups]
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"baseline {baseline!r} is no setting of this sweep.{nearest(baseline, labels)}")
    values = [_by_seed(rows, metric) for _, rows in groups]
    first = labels.index(baseline) if baseline is not None else next((i for i, v in enumerate(values) if v), 0)
    pairs = [_paired(v, values[first]) for v in values] if values else []
    compared = sum(len(p) > 1 for p in pairs)
    table = []
    for i, (typed, rows) in enumerate(groups):
        mean, low, high = interval(list(values[i].values()))
        difference = (0.0, 0.0, 0.0) if i == first else interval(pairs[i], max(math.comb(compared, 2), 1))
        distinct = i != first and (difference[1] > 0 or difference[2] < 0)
        row = {"setting": labels[i], **dict(zip(swept, typed if swept else (), strict=True))}
        row |= {"n": len(values[i]), "failed": len(rows) - len(values[i]), "mean": mean, "low": low, "high": high}
        row |= dict(zip(("difference", "difference/low", "difference/high"), difference, strict=True))
        table.append({**row, "distinct": distinct, "baseline": i == first})
    return pd.DataFrame(table)


def interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t, wide enough to hold for all of `comparisons` together."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = student_t(1 - (1 - LEVEL) / comparisons, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


@cache
def student_t(share: float, degrees: int) -> float:
    """The t within whose distance from 0 the given share of Student's distribution lies; degrees of freedom >= 1."""
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < share else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _share_within(theta: float, degrees: int) -> float:
    """Of |T| < sqrt(degrees) tan(theta): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd, cosine = degrees % 2, math.cos(theta)
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * j / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def _label(swept: Sequence[str], values: Sequence[object]) -> str:
    """What differs in short: of an option, and of a nested key, the last name says enough."""
    short = [k if sum(o.endswith(k.rsplit(".", 1)[-1]) for o in swept) > 1 else k.rsplit(".", 1)[-1] for k in swept]
    shown = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in values]
    return " ".join(f"{k}={v}" for k, v in zip(short, shown, strict=True) if v != "") or "as it is"


def _by_seed(rows: pd.DataFrame, metric: str) -> dict[object, float]:
    """seed -> value of the arms that finished with one."""
    scored = rows[(rows["state"] == "finished") & np.isfinite(rows[metric].astype(float))]
    seeds = scored["seed"] if "seed" in scored else ["?"] * len(scored)
    return dict(zip(seeds, scored[metric].astype(float), strict=True))


def _paired(values: dict[object, float], baseline: dict[object, float]) -> list[float]:
    return [values[s] - baseline[s] for s in values if s in baseline]
