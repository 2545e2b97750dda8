"""Which times are trained on: a uniform draw per sample becomes a level.

The draws come from the trainer, by position in the global batch, so that they depend neither on ranks nor on
micro-batches; `stratified` tells it which kind to hand over.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.levels import Level
from ldm.diffusion.schedulers import Scheduler


class Uniform:
    """Every time equally likely."""

    stratified = False

    def __call__(self, u: Tensor, scheduler: Scheduler) -> Level:  # (B,) in (0, 1) -> (B,)
        return scheduler.level(scheduler.training_time(u))


class Stratified(Uniform):
    """One time in each of B equal strata of the global batch (Kingma et al. 2021): less noise in the loss."""

    stratified = True
