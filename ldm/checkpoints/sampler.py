"""How a checkpoint is sampled: as its run was set to, by samplers as its own scheduler's file adjusts them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.build import build, read_node
from ldm.config.root import conf_dir
from ldm.diffusion.samplers.solver import Solver
from ldm.errors import ConfigError, nearest
from ldm.formats import schedulers

USUAL: dict[str, int | float] = {"num_steps": 30, "guidance": 7.5, "guidance_rescale": 0.0, "eval_images": 256}


CLASSIFIER_FREE = {"_target_": "ldm.diffusion.guidance.ClassifierFree"}


MOST = 10_000  # steps or pictures: a file that says more is no run's


def sampling_settings(asked: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `USUAL`, eta, and sampler, grid and guider: as asked, where that is None or empty the run's own.

    asked: any of these keys; a guider without `_target_` changes the own one. own: a run's configuration; what it does
    not say is usual. A run's grid and eta belong to its sampler: another sampler walks its own. ConfigError for own
    values that cannot be.
    """
    found = {name: _first(asked.get(name), own.get(name), usual, name) for name, usual in USUAL.items()}
    sampler = None if asked.get("sampler") == "own" else asked.get("sampler")
    walk = {} if sampler else own
    found["sampler"] = sampler or _own_node("sampler", walk)
    found["grid"] = asked.get("grid") or _own_node("grid", walk)
    found["eta"] = _first(asked.get("eta"), walk.get("eta"), None, "eta")
    guider = asked.get("guider") or {}
    if isinstance(guider, Mapping):
        if "_target_" not in guider:
            guider = {**_own_guider(own), **_set(guider)}
        guider = {**guider, "rescale": found["guidance_rescale"]}
    return {**found, "guider": guider}


def _first(asked: Any, own: Any, usual: int | float | None, name: str) -> Any:
    """What was asked for, the run's own number, or the usual one. ConfigError where the own one is none."""
    if asked is not None or own is None:
        return usual if asked is None else asked
    whole = isinstance(usual, int)
    number = isinstance(own, int if whole else int | float) and not isinstance(own, bool)
    if not number or not math.isfinite(own) or (whole and not 1 <= own <= MOST):
        raise ConfigError(f"the checkpoint's config.yaml says {name}={own!r}, which cannot be: give {name}= here.")
    return own


def _own_node(group: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A group's node as the run has it, {} where it leaves it open."""
    node = own.get(group) or {}
    if not isinstance(node, Mapping):
        raise ConfigError(f"the checkpoint's config.yaml says {group}={node!r}, which cannot be: give {group}= here.")
    return dict(node)


def _own_guider(own: Mapping[str, Any]) -> dict[str, Any]:
    node = {**CLASSIFIER_FREE, **_set(_own_node("guider", own))}
    second = node.get("checkpoint")
    if second and not Path(str(second)).exists():  # never fetched: a file may not say what this machine downloads
        raise ConfigError(
            f"this run was guided by a second model, {second}, which is not there: give guider=autoguidance "
            "guider.checkpoint=PATH, or guider=classifier_free."
        )
    return node


def _set(node: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in node.items() if v is not None}


def solver_of(sampler: str | Path | Mapping[str, Any] | None, scheduler_config: dict[str, Any] | None) -> Solver | None:
    """A sampler's name, YAML or node as a solver; None and "own": the scheduler_config's, None where there is none."""
    options: dict[str, Any] = {}
    if not sampler or sampler == "own":
        if scheduler_config is None:
            return None
        sampler, options = schedulers.own_sampler(scheduler_config)
    node = dict(sampler) if isinstance(sampler, Mapping) else _sampler_node(sampler)
    node["solve"] = {**node["solve"], **options}
    if scheduler_config is not None:
        node = schedulers.adjusted(node, scheduler_config)
    return build(node, "sampler")


def _sampler_node(sampler: str | Path) -> dict[str, Any]:
    given, folder = Path(sampler), conf_dir() / "sampler"
    path = given if given.suffix in (".yaml", ".yml") else folder / f"{sampler}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(
            f"sampler={sampler}: there is no such sampler.{nearest(str(sampler), names)} There is: {', '.join(names)}."
        )
    return read_node(path)
