"""Several runs side by side: a table of them, and in what their configurations differ."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.analysis.run import Run, is_run, nearby
from ldm.errors import ConfigError

Scalars = dict[str, Any]


def runs(pattern: str | Path = "outputs/*") -> pd.DataFrame:
    """One row a run: path, name, experiment, state, step, seed, the choices that differ, last metrics and scores.

    A sweep's folder stands for its arms; arms that left no run (refused, failed) have their reason as message.

    >>> runs("outputs/*")[["name", "state", "val/loss"]]
    >>> runs("outputs/quickstart-sweep-642aed")
    """
    found, others = _expand(pattern)
    if not found and not others:
        raise ConfigError(f"no run at {Path(pattern).absolute()}. {nearby(Path(pattern))}")
    flats = [_flatten(run.config) for run in found]
    choices = list(dict.fromkeys([*_differing(flats), *(k for _, given in others for k in given)]))
    rows = [_row(run, {k: flat[k] for k in choices if k in flat}) for run, flat in zip(found, flats, strict=True)]
    table = pd.DataFrame([*rows, *({**given, **row} for row, given in others)])
    first = list(dict.fromkeys(["path", "name", "experiment", "state", "step", "seed", *choices]))
    rest = [c for c in table.columns if c not in (*first, "message")]
    table = table.reindex(columns=[*first, *rest, *(["message"] if others else [])])
    return table.assign(**{c: pd.to_numeric(table[c]).astype("Int64") for c in ("step", "seed")})


def newest(*patterns: str | Path) -> Run:
    """The run whose status was written last, under the first of these patterns that has any.

    >>> newest("outputs/*", "../outputs/*")
    """
    patterns = patterns or ("outputs/*",)
    for pattern in patterns:
        found, _ = _expand(pattern)
        if found:
            return max(found, key=lambda run: run.status.get("time", 0.0))
    where = ", ".join(str(Path(p).absolute()) for p in patterns)
    raise ConfigError(f"no run at {where}: make one with python -m ldm.run experiment=quickstart, or give its path.")


def compare(a: Run | str | Path, b: Run | str | Path) -> pd.DataFrame:
    """The configuration keys in which two runs differ, a column a run.

    A class stands under its node's key (`scheduler`, not `scheduler._target_`); a nested key that only repeats a key
    of the root (`data.seed`, `trainer.max_steps`) is left out.

    >>> compare("outputs/mine", "outputs/other")
    """
    both = [run if isinstance(run, Run) else Run(run) for run in (a, b)]
    names = [run.name for run in both] if both[0].name != both[1].name else [str(run.path) for run in both]
    left, right = (_flatten(run.config) for run in both)
    rows = {key: [left.get(key), right.get(key)] for key in _differing([left, right])}
    return pd.DataFrame.from_dict(rows, orient="index", columns=names, dtype=object).rename_axis("key")


def _expand(pattern: str | Path) -> tuple[list[Run], list[tuple[Scalars, Scalars]]]:
    """The runs that a pattern names, and (row, given choices) of every arm of its sweeps that left no run."""
    found: list[Run] = []
    others: list[tuple[Scalars, Scalars]] = []
    for path in sorted(map(Path, glob.glob(str(pattern)))):
        if is_run(path):
            found.append(Run(path))
        elif (path / "results.csv").is_file():
            found += [Run(arm) for arm in sorted(path.iterdir()) if is_run(arm)]
            others += _without_run(path)
    return found, others


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


def _row(run: Run, choices: Scalars) -> Scalars:
    status, config = run.status, run.config
    about = {"path": run.path, "name": run.name, "experiment": config.get("experiment"), "seed": config.get("seed")}
    # While a run is running its status holds the step that it started from.
    about |= {"state": status.get("state"), "step": max(status.get("step", 0), max(run.metrics["step"], default=0))}
    last = {k: v for k, v in run.scalars().items() if "_by_t/" not in k}
    scores = run.scores.dropna(subset=["low"])
    short = {k: v.rsplit(".", 1)[-1] if isinstance(v, str) and v.startswith("ldm.") else v for k, v in choices.items()}
    return {**short, **about, **last, **dict(zip(scores["score"], scores["value"], strict=True))}


def _flatten(node: Any, key: str = "") -> Scalars:
    """Dotted keys to leaves; a list is a leaf, and a class stands under its node's own key."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    flat: Scalars = {}
    for name, value in node.items():
        flat |= _flatten(value, key if name == "_target_" else f"{key}.{name}" if key else str(name))
    return flat


def _differing(configs: list[Scalars]) -> list[str]:
    """The keys whose values are not the same in all flat configurations, without repetitions of root keys."""

    def values(key: str) -> list[str]:
        return [json.dumps(c[key], default=str) if key in c else "" for c in configs]

    keys = [k for k in dict.fromkeys(k for c in configs for k in c) if len(set(values(k))) > 1]
    roots = {k: values(k) for k in keys if "." not in k}
    return [k for k in keys if "." not in k or roots.get(k.rsplit(".", 1)[-1]) != values(k)]
