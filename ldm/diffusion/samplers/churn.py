"""Churn: noise added before a step, for Euler and Heun."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.levels import Level, Levels
from ldm.diffusion.samplers.solver import Noise


@dataclass(frozen=True)
class Churn:
    """Karras et al. 2022, Algorithm 2: sigma/alpha grows by min(amount/num_steps, sqrt(2) - 1) where it lies inside
    [low, high]; `s_noise` scales the noise that fills the gap. The network is told the higher level.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    s_noise: float = 1.0

    def __call__(self, x: Tensor, level: Level, levels: Levels, noise: Noise) -> tuple[Tensor, Level]:
        if self.amount == 0 or level.alpha == 0 or not self.low <= level.ratio <= self.high:
            return x, level
        raised = levels.scheduler.level_at(level.ratio * (1 + min(self.amount / levels.num_steps, math.sqrt(2) - 1)))
        deviation = raised.alpha * (raised.ratio**2 - level.ratio**2) ** 0.5
        return raised.alpha / level.alpha * x + self.s_noise * deviation * noise(x), raised
