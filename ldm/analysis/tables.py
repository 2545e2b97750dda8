"""Several runs side by side: a table of them, and in what their configurations differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.analysis.logged import Logged, Scalars, is_number, scores_of
from ldm.analysis.run import Run, nearby
from ldm.analysis.scores import alike, cards_of, differing
from ldm.analysis.sources import Source, as_run, find
from ldm.errors import ConfigError


def runs(pattern: str | Path = "outputs/*") -> pd.DataFrame:
    """One row a run: path, name, experiment, state, step, seed, the choices that differ, last metrics and scores.

    A sweep's folder stands for its arms; arms that left no run (refused, failed) have their reason as message, and so
    have runs that cannot be read. W&B's server and its offline files give the same columns.

    >>> runs("outputs/*")[["name", "state", "val/loss"]]
    >>> runs("outputs/quickstart-sweep-642aed")
    >>> runs("wandb://entity/project")
    >>> runs("outputs/*/wandb")
    """
    found = find(pattern)
    if not found.runs and not found.without_run:
        raise ConfigError(f"no run at {_absolute(pattern)}. {_nearby(pattern)}")
    readable: list[tuple[Logged, Scalars]] = []
    others = list(found.without_run)
    for run in found.runs:
        try:
            readable.append((run, _flatten(run.config)))
        except ConfigError as error:
            others.append(({"path": run.path, "name": run.name, "state": "unreadable", "message": str(error)}, {}))
    flats = [flat for _, flat in readable]
    choices = list(dict.fromkeys([*_differing(flats), *(k for _, given in others for k in given)]))
    measured = alike([run.evaluation for run, _ in readable])
    rows = [
        _row(run, {k: flat[k] for k in choices if k in flat}, scores)
        for (run, flat), scores in zip(readable, measured, strict=True)
    ]
    table = pd.DataFrame([*rows, *({**given, **row} for row, given in others)])
    first = list(dict.fromkeys(["path", "name", "experiment", "state", "step", "seed", *choices]))
    rest = [c for c in table.columns if c not in (*first, "message")]
    table = table.reindex(columns=[*first, *rest, *(["message"] if others else [])])
    return table.assign(**{c: pd.to_numeric(table[c], errors="coerce").astype("Int64") for c in ("step", "seed")})


def newest(*patterns: str | Path) -> Run:
    """The run directory whose status was written last, under the first of these patterns that has any.

    >>> newest("outputs/*", "../outputs/*")
    """
    patterns = patterns or ("outputs/*",)
    for pattern in patterns:
        found = [run for run in find(pattern).runs if isinstance(run, Run)]
        if found:
            return max(found, key=lambda run: _number(run.status.get("time")))
    where = ", ".join(str(Path(p).absolute()) for p in patterns)
    raise ConfigError(f"no run at {where}: make one with python -m ldm.run experiment=quickstart, or give its path.")


def compare(a: Source, b: Source) -> pd.DataFrame:
    """The configuration keys in which two runs differ, a column a run.

    A class stands under its node's key (`scheduler`, not `scheduler._target_`); a nested key that only repeats a key
    of the root (`data.seed`, `trainer.max_steps`) is left out.

    >>> compare("outputs/mine", "outputs/other")
    """
    both = [as_run(run) for run in (a, b)]
    left, right = (_flatten(run.config) for run in both)
    rows = {key: [left.get(key), right.get(key)] for key in _differing([left, right])}
    return pd.DataFrame.from_dict(rows, orient="index", columns=_names(*both), dtype=object).rename_axis("key")


def diff(a: Source, b: Source) -> pd.DataFrame:
    """In what two runs differ, in configuration and results: part, key, a column a run, and b's lead over a.

    part: "configuration" as `compare` has it, "metric" the last values of scalars, "score" those of the evaluation,
    each followed by what it was measured with otherwise ("card").
    change: b - a of numbers. low, high: its 95 % interval where both scores have one, by square and add (Newcombe 1998,
    method 10), as if the two had been measured on draws of their own; they share seeds and prompts, so it is too wide
    rather than too narrow. What is equal is left out.

    >>> diff("outputs/mine", "outputs/other").query("part == 'score'")
    """
    both = [as_run(run) for run in (a, b)]
    names = _names(*both)
    columns = ["part", "key", *names, "change", "low", "high"]
    told = compare(*both)
    rows = [("configuration", key, *values, *_change(*values)) for key, *values in told.itertuples(name=None)]
    left, right = (run.scalars() for run in both)
    for key in dict.fromkeys([*left, *right]):
        values = (left.get(key), right.get(key))
        rows += [("metric", key, *values, *_change(*values))] if values[0] != values[1] else []
    scores = [{score: rest for score, *rest in run.scores.itertuples(index=False, name=None)} for run in both]
    for key in dict.fromkeys(k for side in scores for k in side):
        one, other = (side.get(key, [None] * 3) for side in scores)
        if not _same(one[0], other[0]):
            rows.append(("score", key, one[0], other[0], *_change(one[0], other[0], one[1:3], other[1:3])))
            cards = {name: cards_of(run.evaluation).get(key, {}) for name, run in zip(names, both, strict=True)}
            rows += [
                ("card", f"{key}: {field}", *(values.get(name) for name in names), None, None, None)
                for field, values in differing(cards).items()
                if all(cards.values())
            ]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({c: float for c in columns[-3:]})


def _names(a: Logged, b: Logged) -> list[str]:
    """What tells two runs apart in a table's head."""
    if a.name != b.name:
        return [a.name, b.name]
    return [str(a.path), str(b.path)] if str(a.path) != str(b.path) else ["a", "b"]


def _change(a: Any, b: Any, of_a: Any = (None, None), of_b: Any = (None, None)) -> tuple[Any, Any, Any]:
    """b - a of two numbers, and its interval from theirs."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)):
        return None, None, None
    ends = [float("nan") if v is None else float(v) for v in (*of_a, *of_b)]
    low = b - a - math.hypot(b - ends[2], ends[1] - a)
    return b - a, low, b - a + math.hypot(ends[3] - b, a - ends[0])


def _same(a: Any, b: Any) -> bool:
    return a == b or all(v is None or v != v for v in (a, b))


def _absolute(pattern: str | Path) -> str:
    return str(pattern) if "://" in str(pattern) else str(Path(pattern).absolute())


def _nearby(pattern: str | Path) -> str:
    return "The project has none." if "://" in str(pattern) else nearby(Path(pattern))


def _number(value: Any) -> float:
    return float(value) if is_number(value) else 0.0


def _row(run: Logged, choices: Scalars, measured: Scalars) -> Scalars:
    status, config = run.status, run.config
    logged, last = run.last()
    about = {"path": run.path, "name": run.name, "experiment": config.get("experiment"), "seed": config.get("seed")}
    # While a run is running its status holds the step that it started from.
    about |= {"state": status.get("state"), "step": max(int(_number(status.get("step"))), logged)}
    last = {k: v for k, v in last.items() if "_by_t/" not in k}
    intervals = {name for name, _, low, *_ in scores_of(run.evaluation) if low is not None}
    scores = {name: value for name, value in measured.items() if name.partition(" [")[0] in intervals}
    short = {k: v.rsplit(".", 1)[-1] if isinstance(v, str) and v.startswith("ldm.") else v for k, v in choices.items()}
    return {**short, **about, **last, **scores}


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
