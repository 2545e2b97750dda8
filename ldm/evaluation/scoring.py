"""Metrics of a configuration, asked one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.build import build
from ldm.errors import ConfigError
from ldm.metrics.evaluation import Evaluation, Scored


def built_metrics(node: Mapping[str, Any] | None) -> dict[str, Scored]:
    """The metrics of a configuration by their names; ConfigError for one that cannot be asked."""
    nodes = {} if not node else {"": node} if "_target_" in node else node
    made = {f"metric.{name}".rstrip("."): build(n, f"metric.{name}") for name, n in nodes.items() if n}
    for name, metric in made.items():
        check_asked(name, metric)
    return made


def check_asked(name: str, metric: Any) -> None:
    """ConfigError for what nothing would ask."""
    if not isinstance(metric, Scored):
        raise ConfigError(
            f"{name}={type(metric).__module__}.{type(metric).__name__} has no method score(evaluation) that gives "
            "{name: number}, so nothing would ask it: write a class that has one around it, as in "
            "ldm/metrics/reconstruction.py (CONTRIBUTING.md), or leave it out."
        )


def check_count(metrics: Mapping[str, Scored], count: int) -> None:
    """ConfigError where so many pictures are too few for one of the metrics."""
    for name, metric in metrics.items():
        if hasattr(metric, "wants"):
            try:
                metric.wants(count)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error


@torch.no_grad()
def scores(metrics: Mapping[str, Scored], evaluation: Evaluation) -> dict[str, float]:
    """What all metrics say, as floats; what is no score is said in a line each and left out."""
    result: dict[str, float] = {}
    for name, metric in metrics.items():
        evaluation.bind(metric)
        given = metric.score(evaluation)
        if not isinstance(given, Mapping):
            print(f"{name}: score gave {type(given).__name__}, not {{name: number}}: it is left out.")
            continue
        for key, value in given.items():
            number = _number(value)
            if not isinstance(key, str) or number is None:
                print(f"{name}: {key!r} is {type(value).__name__}, not a number under a name: it is left out.")
            elif key in result:
                print(f"{name}: another metric has said {key!r} already: this one is left out.")
            else:
                result[key] = number
    return result


def _number(value: Any) -> float | None:
    """Real numbers and tensors or arrays of one; None for all else."""
    try:
        return None if isinstance(value, str | bytes | bool | complex) or value is None else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
