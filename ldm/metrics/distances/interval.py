"""What an estimate is uncertain by, from leaving parts of the sample out.

A bootstrap would repeat pictures, which a distance between sets takes for less variety: its intervals of a Fréchet
distance in 64 dimensions hold the truth in none of 100 repetitions. Leaving groups out repeats nothing, and also says
how far the estimate lies from that of an unlimited sample (experiments/015_metrics).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 10  # that a sample is cut into
Z = 1.959964  # 95 % of a normal distribution
T = {9: 2.262157, 18: 2.100922}  # of Student's, by degrees of freedom: one set of groups, two of them


@dataclass(frozen=True)
class Estimate:
    """value: of the sample as it is; error: its standard error; bias: what it is too large by, because the sample is
    limited; quantile: how many errors a 95 % interval reaches to either side."""

    value: float
    error: float
    bias: float = 0.0
    quantile: float = Z

    @property
    def unlimited(self) -> float:
        """What samples without end would give, to first order in one over their number."""
        return self.value - self.bias

    def named(self, name: str, least: float = -math.inf, most: float = math.inf) -> dict[str, float]:
        """{name, name/low, name/high}: an interval for what as many pictures give on average.

        least, most: what such a number can be.
        """
        reach = self.quantile * self.error
        return {
            name: self.value,
            f"{name}/low": max(self.value - reach, least),  # in this order NaN stays
            f"{name}/high": min(self.value + reach, most),
        }

    def without_limit(self) -> Estimate:
        """Of `unlimited`, with the same error: an interval for the distance of the two distributions."""
        return Estimate(self.unlimited, self.error, 0.0, self.quantile)


def mean_of(values: Tensor) -> Estimate:  # (N,), independent of each other; NaN is the error of a single one
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def groups_of(n: int, groups: int = GROUPS) -> Tensor:  # -> (n,) the group of each sample
    """Every tenth one belongs together, so that a group has its share of whatever the order is by."""
    return torch.arange(n) % groups


def left_out(value: float, *without: Tensor) -> Estimate:
    """The jackknife over groups (Tukey 1958; Shao and Tu 1995, section 2.3) of one or two independent samples.

    value: of all; without: for each sample (G,) values, each without one group of it.
    """
    without = tuple(w.double() for w in without)
    variance = sum(((len(w) - 1) / len(w)) * (w - w.mean()).square().sum() for w in without)
    bias = sum((len(w) - 1) * (w.mean() - value) for w in without)
    freedom = sum(len(w) - 1 for w in without)
    quantile = T.get(freedom, Z)
    return Estimate(value, math.sqrt(float(variance)), float(bias), quantile)
