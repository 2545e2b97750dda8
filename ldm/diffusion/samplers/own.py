"""The sampler of models that name none: those trained here."""

from __future__ import annotations

from ldm.diffusion.grids import Conventions, karras, trailing
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.euler import euler
from ldm.diffusion.samplers.heun import heun
from ldm.diffusion.samplers.solver import Solver
from ldm.diffusion.schedulers import EDM, Scheduler


def own_solver(scheduler: Scheduler) -> Solver:
    """DDIM on tables and Euler on rectified flow, on trailing levels; Heun on Karras' levels for EDM."""
    if isinstance(scheduler, EDM):
        return Solver(heun, karras, Conventions(start="sigma"))
    return Solver(euler if scheduler.coordinate == "sigma" else ddim, trailing)
