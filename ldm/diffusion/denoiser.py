"""A network, a scheduler and a parameterization make a denoiser: (x_t, level, cond) -> x0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.levels import Level, Number, right_pad
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedulers import Scheduler

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # (B,C,H,W), (B,), Condition -> (B,C,H,W)


class Denoiser:
    """E[x0 | x_t], as the network sees it."""

    def __init__(self, model: Network, scheduler: Scheduler, parameterization: Parameterization):
        self.model = model
        self.scheduler = scheduler
        self.parameterization = parameterization
        # Karras et al. 2022: c_in. None: the network sees x_t as it is.
        self.sigma_data = parameterization.sigma_data or scheduler.sigma_data

    def output(self, x_t: Tensor, level: Level, cond: Condition) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        """What the network says: an estimate of a x0 + b eps. Concatenated channels are never scaled."""
        x_in = x_t
        if self.sigma_data is not None:
            alpha, sigma = right_pad(level.alpha, x_t), right_pad(level.sigma, x_t)
            x_in = x_t / (alpha**2 * self.sigma_data**2 + sigma**2) ** 0.5
        if cond.concat is not None:
            x_in = torch.cat([x_in, cond.concat], dim=1)
        return self.model(x_in, _per_sample(level.timestep, x_t), cond)

    def x0(self, x_t: Tensor, output: Tensor, level: Level) -> Tensor:
        """The jump to x0 from an output."""
        return self.parameterization.x0(x_t, output, level)

    def __call__(self, x_t: Tensor, level: Level, cond: Condition) -> Tensor:
        return self.x0(x_t, self.output(x_t, level, cond), level)


def _per_sample(timestep: Number, x_t: Tensor) -> Tensor:
    if isinstance(timestep, Tensor):
        return timestep.to(device=x_t.device, dtype=torch.float32)
    return torch.full((len(x_t),), timestep, device=x_t.device, dtype=torch.float32)
