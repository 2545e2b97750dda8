"""task=objective: what the chosen scheduler, parameterization, weighting and times ask for, as a table and a figure."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ldm.analysis.objective import Bin, by_log_snr, findings
from ldm.build import build
from ldm.checkpoints.sampler import USUAL
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.own import own_solver
from ldm.diffusion.schedulers import Scheduler

READ = ("scheduler", "parameterization", "weighting", "times", "sampler", "grid", "num_steps")
SHOWN_TIMES = (0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def objective(config: DictConfig) -> dict[str, float]:
    """Prints the tables and findings, and writes objective.csv and objective.png into output=DIR."""
    check(config)
    values = plain(config)
    scheduler: Scheduler = build(values["scheduler"], "scheduler")
    parameterization = build(values["parameterization"], "parameterization")
    weighting, times = build(values["weighting"], "weighting"), build(values["times"], "times")
    parameterization.check(scheduler)
    solver = build(values["sampler"], "sampler") or own_solver(scheduler)
    levels = solver.levels(scheduler, values["num_steps"] or int(USUAL["num_steps"]), build(values["grid"], "grid"))
    bins = by_log_snr(scheduler, parameterization, weighting, times)
    found = findings(scheduler, bins, levels)

    output = Path(values["output"] or f"{values['outputs']}/objective-{digest({k: values[k] for k in READ})}")
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=110)
    console.print(_levels_table(scheduler))
    console.print(_bins_table(bins))
    with (output / "objective.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Bin)])
        writer.writeheader()
        writer.writerows(asdict(b) for b in bins)
    _figure(scheduler, levels, bins, _title(values)).savefig(output / "objective.png", dpi=110)
    for sentence in found or ["nothing is wrong with this choice."]:
        print(f"- {sentence}")
    print(f"objective: {output / 'objective.png'}, {output / 'objective.csv'}")
    return {"terminal_log_snr": float(scheduler.level(1.0).log_snr), "findings": float(len(found))}


def _title(values: dict[str, Any]) -> str:
    names = [values[k]["_target_"].rpartition(".")[2] for k in ("scheduler", "parameterization", "weighting", "times")]
    return " / ".join(names)


def _levels_table(scheduler: Scheduler) -> Table:
    table = Table("t", "timestep", "alpha", "sigma", "sigma/alpha", "log-SNR", title="the scheduler")
    for t in SHOWN_TIMES:
        level = scheduler.level(t)
        row = (level.timestep, level.alpha, level.sigma, level.ratio, level.log_snr)
        table.add_row(f"{t:g}", *(f"{float(v):.4f}" for v in row))
    return table


def _bins_table(bins: list[Bin]) -> Table:
    table = Table(
        "log-SNR",
        "draws",
        "weight on the output",
        "emphasis on the output",
        "emphasis on x0",
        title="what is trained on",
    )
    for b in bins:
        table.add_row(
            f"{b.low:g} to {b.high:g}", f"{b.share:.2%}", f"{b.weight:.4g}", f"{b.emphasis:.2%}", f"{b.on_x0:.2%}"
        )
    return table


def _figure(scheduler: Scheduler, levels: Levels, bins: list[Bin], title: str) -> Figure:
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
