"""What a run will measure, known before it trains, so that a misspelt optimized_metric= is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.build import build
from ldm.config.check import module_kind
from ldm.errors import ConfigError, SweepError
from ldm.sweep.arms import UNKNOWN, unknown_metric
from ldm.training.run.build import build_module, build_parts
from ldm.training.run.class_images import ClassImages

Names = set[str]


def check_optimized(metric: str | None, names: Names) -> None:
    """SweepError where nothing of this name will be measured."""
    if metric and metric not in names and UNKNOWN not in names:
        raise SweepError(unknown_metric(metric, names))


def check_kept(values: Mapping[str, Any]) -> None:
    """ConfigError where the checkpoint that is best in something is to be kept, and nothing of this name is logged."""
    best = ((values["callbacks"] or {}).get("checkpoints") or {}).get("keep_best")
    if best and not {best, UNKNOWN} & (names := of_training(values)):
        raise ConfigError(unknown_metric(best, names, "callbacks.checkpoints.keep_best"))


def check_pruned(values: Mapping[str, Any]) -> None:
    """SweepError where the arms of a sweep are pruned by a metric, and nothing of this name is logged."""
    metric = ((values["callbacks"] or {}).get("pruning") or {}).get("metric")
    if metric and not {metric, UNKNOWN} & (names := of_training(values)):
        raise SweepError(unknown_metric(metric, names, "sweep.pruned_by"))


def of_training(values: Mapping[str, Any]) -> Names:
    """Names of the scalars of one training run, from the module and the callbacks that log them."""
    drawn = values["class_shards"] or values["class_prompt"]
    prior = ClassImages(torch.zeros(1, 2, 1, 1), [""]) if drawn and module_kind(values) == "latent_diffusion" else None
    module = build_module(values, build_parts(values, "meta"), prior)
    names: Names = set()
    for node in (values["callbacks"] or {}).values():
        callback = build(node, "callbacks")
        if hasattr(callback, "logged"):
            names |= set(callback.logged(module, values["max_steps"]))
        elif callback is not None and not type(callback).__module__.startswith(("ldm.", "lightning.")):
            names.add(UNKNOWN)
    return names


def of_evaluation(node: Mapping[str, Any] | None) -> Names:
    """Names of the scores of task=evaluate, from the metrics that give them."""
    nodes = [] if not node else [node] if "_target_" in node else list(node.values())
    return {name for n in nodes if n for name in getattr(build(n, "metric"), "scores", [UNKNOWN])}
