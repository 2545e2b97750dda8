"""What tells the network the time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(timestep: Tensor, width: int) -> Tensor:  # (B,) -> (B,D)
    """Cosines, then sines, of the time at width/2 frequencies from 1 down towards 1/10000 (DDPM, section B).

    Always float32: bfloat16 cannot tell timestep 999 from 1000. Any real time is welcome.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids of the time."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.in_width = in_width
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:  # (B,) -> (B,D)
        waves = sinusoids(timestep, self.in_width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))
