"""Samplers by name, as they are on a checkpoint: its own scheduler's file adjusts them (as diffusers' from_config)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.build import build, read_node
from ldm.config import conf_dir, nearest
from ldm.diffusion.samplers.solver import Solver
from ldm.errors import ConfigError
from ldm.formats import schedulers


def solver_of(sampler: str | Path | dict[str, Any] | None, scheduler_config: dict[str, Any] | None) -> Solver | None:
    """A sampler's name, YAML or node as a solver; None and "own": the scheduler_config's, None where there is none."""
    options: dict[str, Any] = {}
    if not sampler or sampler == "own":
        if scheduler_config is None:
            return None
        sampler, options = schedulers.own_sampler(scheduler_config)
    node = dict(sampler) if isinstance(sampler, dict) else _sampler_node(sampler)
    node["solve"] = {**node["solve"], **options}
    if scheduler_config is not None:
        node = schedulers.adjusted(node, scheduler_config)
    return build(node, "sampler")


def training_solver(config: Mapping[str, Any]) -> Solver | None:
    """What draws pictures while a run trains: its checkpoint's own sampler, ours where there is none that we have."""
    try:
        return solver_of(None, config.get("scheduler_config"))
    except ConfigError as error:
        warnings.warn(f"pictures of this training are drawn by ldm's own sampler: {error}", stacklevel=2)
        return None


def _sampler_node(sampler: str | Path) -> dict[str, Any]:
    given, folder = Path(sampler), conf_dir() / "sampler"
    path = given if given.suffix in (".yaml", ".yml") else folder / f"{sampler}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(
            f"sampler={sampler}: there is no such sampler.{nearest(str(sampler), names)} There is: {', '.join(names)}."
        )
    return read_node(path)
