"""What a choice of scheduler, parameterization, weighting and times asks of a network, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ldm.diffusion.levels import Levels
from ldm.diffusion.parameterizations import Parameterization
from ldm.diffusion.schedulers import Scheduler
from ldm.diffusion.times import Times
from ldm.diffusion.weightings import Weighting

DRAWS = 100_000
_LEFT_OVER = 0.02  # share of the signal in x_1's standard deviation that sampling from pure noise can ignore
_CONCENTRATED = 0.5  # of the weighted loss within one nat of log-SNR


@dataclass
class Bin:
    """One interval of log-SNR = 2 log(alpha/sigma).

    share: of the training draws.
    weight: mean weight of its draws on the squared error of the network's output.
    emphasis: share x weight of its part of the total; what the weighted loss would spend there if the squared error
        of the output were the same at every level.
    on_x0: share x weight on the squared error of x0, of the total. A training objective is this function (Kingma and
        Gao 2023).
    """

    low: float
    high: float
    share: float
    weight: float
    emphasis: float
    on_x0: float


def by_log_snr(
    scheduler: Scheduler,
    parameterization: Parameterization,
    weighting: Weighting,
    times: Times,
    width: float = 1.0,  # of a bin, in nats
) -> list[Bin]:
    """The objective over log-SNR, from `DRAWS` stratified draws. Pure noise is a bin of its own, at -inf."""
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    level = times(u, scheduler)
    alpha, sigma, log_snr = (torch.as_tensor(v) for v in (level.alpha, level.sigma, level.log_snr))
    weight = weighting(alpha, sigma, parameterization).double()
    on_x0 = weight * (parameterization.determinant(alpha, sigma) / sigma) ** 2
    bins = []
    for index in (log_snr / width).floor().unique().tolist():
        inside = (log_snr / width).floor() == index
        low, high = (index * width, (index + 1) * width) if math.isfinite(index) else (index, index)
        bins.append(
            Bin(
                low,
                high,
                share=inside.double().mean().item(),
                weight=weight[inside].mean().item(),
                emphasis=(weight[inside].sum() / weight.sum()).item(),
                on_x0=(on_x0[inside].sum() / on_x0.sum()).item(),
            )
        )
    return bins


def findings(scheduler: Scheduler, bins: list[Bin], levels: Levels) -> list[str]:
    """What is wrong with the choice, one sentence each with the way out; empty where nothing is."""
    found = []
    top = scheduler.level(1.0)
    signal = float(top.alpha) / math.hypot(float(top.alpha), float(top.sigma))
    if signal > _LEFT_OVER:
        found.append(
            f"at t = 1 the signal's share is {signal:.4f} (log-SNR {top.log_snr:.2f}): sampling "
            "starts from pure noise, which training never shows, so pictures keep the mean brightness (Lin et al. "
            "2024). scheduler.zero_terminal_snr=true with parameterization=v ends in pure noise."
        )
    for b in bins:
        where = f"log-SNR {b.low:g} to {b.high:g}"
        if b.weight == 0:
            found.append(
                f"{where} is drawn ({b.share:.2%}) with weight 0: it is never learnt, and sampling passes through it. "
                "weighting=simple trains it."
            )
        if b.emphasis > _CONCENTRATED:
            found.append(
                f"{b.emphasis:.0%} of the weighted loss lies at {where}, in {b.share:.1%} of the draws: its gradients "
                "are noisy. A flatter weighting=, or times= that draws more there, spreads it."
            )
    low, high = min(b.low for b in bins), max(b.high for b in bins)
    # Beyond +-20 there is nothing left to tell apart: rectified flow is drawn up to t = 1, never at it.
    walked = [min(max(float(lv.log_snr), -20.0), 20.0) for lv in levels[:-1]]
    outside = [v for v in walked if not min(low, 20.0) - 1e-6 <= v <= max(high, -20.0) + 1e-6]
    if outside:
        found.append(
            f"{len(outside)} of {len(levels) - 1} sampling levels lie where nothing is trained (trained is log-SNR "
            f"{low:g} to {high:g}): choose times= that reach them, or another grid=."
        )
    return found
