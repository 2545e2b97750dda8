"""Does a small denoiser's minute tell which latent space a second stage does best on?

python experiments/014_first_stage/diffusability.py [--steps 400] [--denoiser_steps 30,300]

Autoencoders of the quickstart's shapes that differ in one thing each, a second stage on each of them (the quickstart's
U-Net and its score of shapes), task=latents of each; diffusability.csv, and Spearman's rank correlation of every number
of task=latents with the score in correlations.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
WIDE = ["autoencoder.block_channels=[16,32,48,48]"]
VARIANTS = {
    "kl 5e-7": [],
    "kl 1e-5": ["stages.autoencoder.kl_weight=1e-5"],
    "kl 2e-4": ["stages.autoencoder.kl_weight=2e-4"],
    "2 channels": ["+autoencoder.latent_channels=2", "+model.in_channels=2", "+model.out_channels=2"],
    "12 channels": ["+autoencoder.latent_channels=12", "+model.in_channels=12", "+model.out_channels=12"],
    "factor 8": [*WIDE],
    "equivariant": ["+perturbation@stages.autoencoder.module.perturbations.equivariance=equivariance"],
    "noise 0.5": [
        "+perturbation@stages.autoencoder.module.perturbations.noise=noise",
        "stages.autoencoder.module.perturbations.noise.std=0.5",
    ],
    "absolute error": ["stages.autoencoder.reconstruction=absolute"],
}


def ldm(root: Path, *typed: str) -> float:
    """Runs a command; its seconds."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "ldm.run", *typed], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--denoiser_steps", default="30,300")
    asked = parser.parse_args()
    root, done = Path(tempfile.mkdtemp(prefix="diffusability-")), HERE / "diffusability.csv"
    rows: list[dict[str, Any]] = pd.read_csv(done).to_dict("records") if done.is_file() else []
    for name, typed in VARIANTS.items():
        if name in [row["variant"] for row in rows]:  # of a run that was stopped
            continue
        run = f"v{len(rows)}"
        base = ["experiment=quickstart", "logger=none", f"name={run}", f"max_steps={asked.steps}", *typed]
        seconds = ldm(root, *base, "eval_images=256", "stages.autoencoder.max_steps=300", "stages.report=false")
        scores = json.loads(next((root / "outputs" / run).glob("evaluation*/evaluation.json")).read_text())["metrics"]
        row: dict[str, Any] = {"variant": name, "second_stage_steps": asked.steps, "seconds": round(seconds)}
        row |= {f"score/{k}": v for k, v in scores.items()}
        for steps in map(int, asked.denoiser_steps.split(",")):
            out = root / f"latents-{run}-{steps}"
            shards = next((root / "outputs/stages").glob("shards-*"))
            checkpoint = root / "outputs" / run
            latents = ["task=latents", f"checkpoint={checkpoint}", f"shards={shards}", f"denoiser_steps={steps}"]
            took = ldm(root, *latents, "denoiser_images=2048", f"output={out}")
            with (out / "latents.csv").open() as file:
                found = next(csv.DictReader(file))
            row[f"latents_seconds@{steps}"] = round(took)
            row |= {f"{k}@{steps}" if "diffus" in k else k: float(v) for k, v in found.items() if k != "autoencoder"}
        rows.append(row)
        table = pd.DataFrame(rows)
        table.to_csv(done, index=False)
        print(row, flush=True)
    target = next(c for c in table.columns if c.startswith("score/") and c.endswith("seen/all"))
    numbers = table.select_dtypes("number").drop(columns=["second_stage_steps"])
    ranks = numbers.corr(method="spearman")[target].drop(target).sort_values()
    ranks.rename(f"spearman with {target}").to_csv(HERE / "correlations.csv")
    print(ranks.to_string())


if __name__ == "__main__":
    main()
