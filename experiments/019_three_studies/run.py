"""Samplers against steps, guidance against words and variety, lengths of averages: three finished runs, three seeds.

    python -m ldm.run -m experiment=quickstart ema=power callbacks.snapshots.every_n_steps=37 seed=0,1,2
    python experiments/019_three_studies/run.py samplers|guidance|lengths|figures RUN RUN RUN

A row here is what `task=evaluate checkpoint=RUN sampler=S num_steps=N metric=[shapes,trained] eval_images=128` writes,
without starting anew for each.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from ldm.analysis import settings
from ldm.checkpoints.averages import average
from ldm.checkpoints.folder import find, read_manifest
from ldm.data.fields import fields_of
from ldm.evaluation.drawing import FRACTION, evaluation_of, image_shards
from ldm.evaluation.scoring import scores
from ldm.features.trained import TrainedFeatures
from ldm.metrics.distribution import Distribution
from ldm.metrics.perceptual import PerceptualDiversity
from ldm.metrics.shapes import ShapeScore
from ldm.pipeline import Pipeline

HERE = Path(__file__).parent
IMAGES = 128  # of trained and of unseen pairs each
CALLS = (2, 4, 8, 16, 32)  # of the network, twice that with guidance
SAMPLERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 1, "unipc": 1, "ddpm": 1, "add_back": 1}  # calls a step
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 12.0)
LENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25)
SHOWN = {  # what the figures show, of both kinds of pairs together
    "all": "all words right",
    "kd_trained": "kernel distance",
    "recall_trained": "recall",
    "lpips_diversity_random": "LPIPS within a caption",
}


class Bench:
    """One run, measured many times."""

    def __init__(self, run: str, features: TrainedFeatures, diverse: bool = False):
        self.pipe = Pipeline.load(run)
        self.pipe.parts.for_sampling()
        data = self.pipe.config["data"]
        self.images = image_shards(data["shards"], fields_of(data), data.get("validation_fraction", FRACTION))
        self.metrics: dict[str, Any] = {"shapes": ShapeScore()}
        self.metrics["trained"] = Distribution(features, ["kernel", "precision_recall"])
        if diverse:
            self.metrics["diversity"] = PerceptualDiversity()
        self.cache = Path(run).parent / "features"

    def __call__(self, **asked: Any) -> dict[str, float]:
        settings = {**self.pipe.settings(asked), "eval_images": IMAGES, "seed": 0}
        size = self.pipe.config["image_size"] or self.images["train"].facts["image_size"]
        made = evaluation_of(self.pipe.parts.autoencoder, self.pipe, self.images, size, settings, self.cache)
        found = scores(self.metrics, made)
        names = {name.split("/", 1)[1] for name in found}
        halves = {n: [found[f"{h}/{n}"] for h in ("seen", "unseen") if f"{h}/{n}" in found] for n in names}
        return {n: sum(v) / len(v) for n, v in halves.items() if n in SHOWN}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def samplers(runs: list[str], features: TrainedFeatures) -> None:
    rows = []
    for seed, run in enumerate(runs):
        bench = Bench(run, features)
        for sampler, each in SAMPLERS.items():
            for calls in CALLS:
                found = bench(sampler=sampler, num_steps=calls // each)
                rows.append({"seed": seed, "sampler": sampler, "calls": calls, **found})
                print(rows[-1], flush=True)
                write("samplers", rows)


def guidance(runs: list[str], features: TrainedFeatures) -> None:
    rows = []
    for seed, run in enumerate(runs):
        bench = Bench(run, features, diverse=True)
        for scale in SCALES:
            rows.append({"seed": seed, "guidance": scale, **bench(guidance=scale)})
            print(rows[-1], flush=True)
            write("guidance", rows)


def lengths(runs: list[str], features: TrainedFeatures) -> None:
    rows = []
    for seed, run in enumerate(runs):
        bench, folder = Bench(run, features), find(run)
        step = read_manifest(folder)["step"]
        modules = bench.pipe.parts.modules()
        for length in LENGTHS:
            for name, tensor in average(Path(run), length, step).items():
                part, _, inside = name.partition(".")
                assert not modules[part].load_state_dict({inside: tensor}, strict=False).unexpected_keys, name
            rows.append({"seed": seed, "length": length, **bench()})
            print(rows[-1], flush=True)
            write("lengths", rows)


def figures() -> None:
    _lines("samplers", "calls", "calls of the network", "sampler", ["all", "kd_trained"], "sampler=ddim calls=32")
    _lines("guidance", "guidance", "guidance scale", None, list(SHOWN), "guidance=1.5")
    _lines(
        "lengths", "length", "length of the average, a share of the training", None, ["all", "kd_trained"], "length=0.1"
    )


def over_seeds(name: str, score: str, baseline: str) -> pd.DataFrame:
    """A row a setting: mean with its interval over seeds, the paired difference from the baseline with its own."""
    table = pd.read_csv(HERE / f"{name}.csv")
    keys = [k for k in table if k not in SHOWN]
    results = table[keys].assign(state="finished", **{score: table[score]}, message="", directory="")
    return settings(results, score, baseline)


def _lines(name: str, x: str, label: str, by: str | None, names: list[str], baseline: str) -> None:
    figure = Figure(figsize=(4.2 * len(names), 3.6), dpi=90, layout="constrained")
    tables = []
    for axes, score in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        table = over_seeds(name, score, baseline)
        tables.append(table.assign(score=score))
        for key, part in table.groupby(by, sort=False) if by else [("", table)]:
            reach = (part["high"] - part["mean"]).to_numpy()
            axes.errorbar(part[x], part["mean"], reach, marker="o", ms=3, capsize=2, lw=1.2, label=key)
        axes.set(xlabel=label, ylabel=SHOWN[score])
        axes.grid(alpha=0.3)
        if by:
            axes.set_xscale("log", base=2)
            axes.set_xticks(CALLS, [str(n) for n in CALLS])
        if by and score == "kd_trained":
            axes.set_ylim(-0.02, 0.06)  # Heun's with two steps is 0.97
    if by:
        axes.legend(fontsize=8)
    figure.savefig(HERE / f"{name}.png")
    pd.concat(tables).round(5).to_csv(HERE / f"{name}_over_seeds.csv", index=False)


def main() -> None:
    study, runs = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    studies: Mapping[str, Any] = {"samplers": samplers, "guidance": guidance, "lengths": lengths}
    if study == "figures":
        figures()
    else:
        studies[study](runs, TrainedFeatures())


if __name__ == "__main__":
    main()
