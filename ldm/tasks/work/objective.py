"""task=objective: what the chosen scheduler, parameterization, weighting and times ask for, as a table and a figure."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ldm.analysis.objective import Bin, by_log_snr, findings
from ldm.analysis.objective_figure import objective_figure, title
from ldm.build import build
from ldm.checkpoints.sampler import USUAL
from ldm.config.check import check
from ldm.config.root import digest, plain
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
    objective_figure(scheduler, levels, bins, title(values)).savefig(output / "objective.png", dpi=110)
    for sentence in found or ["nothing is wrong with this choice."]:
        print(f"- {sentence}")
    print(f"objective: {output / 'objective.png'}, {output / 'objective.csv'}")
    return {"terminal_log_snr": float(scheduler.level(1.0).log_snr), "findings": float(len(found))}


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
