"""How a checkpoint is sampled: as its run was set to, by samplers as its own scheduler's file adjusts them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ldm.checkpoints.sampler import solver_of
from ldm.diffusion.samplers.solver import Solver
from ldm.errors import ConfigError


def training_solver(config: Mapping[str, Any]) -> Solver | None:
    """What draws pictures while a run trains: its checkpoint's own sampler, ours where there is none that we have."""
    try:
        return solver_of(None, config.get("scheduler_config"))
    except ConfigError as error:
        warnings.warn(f"pictures of this training are drawn by ldm's own sampler: {error}", stacklevel=2)
        return None
