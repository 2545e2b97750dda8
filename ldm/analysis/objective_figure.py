"""The figure of an objective: noise levels, sampling levels, what is drawn and what the weighted loss asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

from ldm.analysis.logged import parts_of
from ldm.analysis.objective import Bin, by_log_snr
from ldm.analysis.sources import Source, as_run
from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.own import own_solver
from ldm.diffusion.schedulers import Scheduler
from ldm.errors import ConfigError

CHOICES = ("scheduler", "parameterization", "weighting", "times")
NUM_STEPS = 30  # where a configuration says nothing, as in sampling


def plot_objective(run: Source | Mapping[str, Any]) -> Figure:
    """What a run's scheduler, parameterization, weighting and times ask of its network; task=objective draws the same.

    run: also a configuration, as `Run(path).config` has it. ConfigError for one without these four.

    >>> plot_objective("outputs/mine")
    """
    found = None if isinstance(run, Mapping) else as_run(run)
    config, source = (run, "the configuration") if found is None else (found.config, found.path)
    assert isinstance(config, Mapping)
    missing = [name for name in CHOICES if not config.get(name)]
    if missing:
        raise ConfigError(
            f"{source} has no {missing[0]}: only module=latent_diffusion has an objective over noise levels."
        )
    made = parts_of(dict(config), [*CHOICES, "sampler", "grid"], source)
    scheduler: Scheduler = made["scheduler"]
    solver = made["sampler"] or own_solver(scheduler)
    levels = solver.levels(scheduler, config.get("num_steps") or NUM_STEPS, made["grid"])
    bins = by_log_snr(scheduler, made["parameterization"], made["weighting"], made["times"])
    return objective_figure(scheduler, levels, bins, title(config))


def title(values: Mapping[str, Any]) -> str:
    names = [values[k]["_target_"].rpartition(".")[2] for k in CHOICES]
    return " / ".join(names)


def objective_figure(scheduler: Scheduler, levels: Levels, bins: list[Bin], title: str) -> Figure:
    t = torch.linspace(scheduler.first_time, 1, 500, dtype=torch.float64)
    level = scheduler.level(t)
    alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
    walked = [lv for lv in levels if lv.sigma > 0]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(title)
    ((first, second), (third, fourth)) = figure.subplots(2, 2)
    first.plot(t, alpha, label="alpha")
    first.plot(t, sigma, label="sigma")
    first.plot([lv.t for lv in walked], [lv.sigma for lv in walked], "|", color="black", label="sampling levels")
    if sigma.max() > 2:
        first.set_yscale("log")
    first.set(xlabel="t")
    first.legend()
    finite = alpha > 0
    second.semilogy(t[finite], torch.as_tensor(level.ratio)[finite])
    marks = [lv for lv in walked if lv.alpha > 0]
    second.plot([lv.t for lv in marks], [lv.ratio for lv in marks], "|", color="black")
    second.set(xlabel="t", ylabel="sigma/alpha")
    shown = [b for b in bins if math.isfinite(b.low)]
    middles = [(b.low + b.high) / 2 for b in shown]
    widths = [b.high - b.low for b in shown]
    third.bar(middles, [b.share for b in shown], width=widths, color="C2", edgecolor="white")
    third.plot([lv.log_snr for lv in marks], [0] * len(marks), "|", color="black", clip_on=False, ms=12)
    third.set(xlabel="log-SNR", ylabel="share of draws")
    fourth.step(middles, [b.emphasis for b in shown], where="mid", label="on the network's output")
    fourth.step(middles, [b.on_x0 for b in shown], where="mid", label="on x0")
    fourth.set(xlabel="log-SNR", ylabel="draws x weight, of the total")
    fourth.legend()
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    for axes in (third, fourth):
        axes.invert_xaxis()  # noise to the right, as in the upper row
    return figure
