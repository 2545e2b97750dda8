"""The sampler of models that name none: those trained here."""

from __future__ import annotations

from ldm.diffusion.grids import trailing
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.euler import euler
from ldm.diffusion.samplers.solver import Solver
from ldm.diffusion.schedulers import Scheduler


def own_solver(scheduler: Scheduler) -> Solver:
    """DDIM on tables, Euler on rectified flow, both on trailing levels."""
    return Solver(euler if scheduler.coordinate == "sigma" else ddim, trailing)
