"""Autoencoders of the emoji: what terms and codebooks give at equal steps.

python experiments/014_first_stage/run.py [terms|codebooks] [--steps 400] [--seeds 0,1]

Each is `python -m ldm.run experiment=ae_small source=emoji_32 ...`, in its own outputs/; numbers are of the 41 held-out
pictures, codebooks' use of all training pictures. terms.csv, codebooks.csv and sheets of pictures stay here.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders import usage
from ldm.checkpoints.load import load_any
from ldm.data.shards.splits import open_split
from ldm.evaluation.drawing import pictures_of
from ldm.features.vgg import LPIPS
from ldm.metrics.perceptual import gradient_energy
from ldm.pictures import grid
from ldm.training.autoencoder import psnr

HERE = Path(__file__).parent
PLAIN = ["module.losses.perceptual=null", "module.losses.adversarial=null"]
SMALL = ["block_channels=[16,32,48]", "layers_per_block=1", "norm_groups=4", "mid_attention=false"]
VQ = ["autoencoder=vq_f4", *(f"autoencoder.{s}" for s in SMALL), "autoencoder.codebook_size=2048", *PLAIN]
TERMS = {
    "plain": PLAIN,
    "perceptual": ["module.losses.adversarial=null"],
    "adversarial": ["module.losses.perceptual=null"],
    "both": [],
}
CODEBOOKS = {
    "gradient": VQ,
    "gradient, revived after 20": [*VQ, "+autoencoder.revive_after=20"],
    "averages 0.99": [*VQ, "+autoencoder.codebook_decay=0.99"],
    "averages 0.99, revived after 20": [*VQ, "+autoencoder.codebook_decay=0.99", "+autoencoder.revive_after=20"],
    "gradient, entropy 0.1": [*VQ, "+autoencoder.entropy_weight=0.1"],
}


def trained(name: str, seed: int, steps: int, typed: list[str], root: Path) -> tuple[Path, float]:
    """The run's folder, and its seconds."""
    run = root / "outputs" / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    command = [sys.executable, "-m", "ldm.run", "experiment=ae_small", "source=emoji_32", "logger=none", *typed]
    command += [f"seed={seed}", f"max_steps={steps}", f"name={run.name}", "stages.report=false"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return run, time.monotonic() - began


def pictures(root: Path, split: str) -> Tensor:  # (N,3,32,32) in [-1, 1]
    shards = open_split(str(next((root / "outputs/stages").glob("shards-*"))), split)
    return torch.cat(list(pictures_of(shards, 32)))


@torch.no_grad()
def scores(run: Path, images: Tensor) -> tuple[dict[str, float], Tensor]:
    autoencoder = load_any(str(run)).for_sampling().autoencoder
    output = autoencoder.decode(autoencoder.encode(images).mode()).clamp(-1, 1)
    found = {
        "psnr": psnr(output, images).mean(),
        "lpips_random": LPIPS()(output, images).mean(),
        "gradient_energy": gradient_energy(output).sum() / gradient_energy(images).sum(),
    }
    return {k: round(v.item(), 5) for k, v in found.items()}, output


@torch.no_grad()
def use(run: Path, images: Tensor) -> dict[str, float]:
    autoencoder = load_any(str(run)).for_sampling().autoencoder
    indices = torch.cat([autoencoder.quantize.nearest(autoencoder.encode(b).mode()) for b in images.split(64)])
    frequencies = usage.shares(indices, autoencoder.quantize.size)
    found = {"use": usage.use(frequencies), "perplexity": usage.perplexity(frequencies)}
    return {k: round(v.item(), 4) for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("terms", "codebooks"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0,1")
    asked = parser.parse_args()
    arms = TERMS if asked.what == "terms" else CODEBOOKS
    root, rows, sheet, names = Path(tempfile.mkdtemp(prefix="first-stage-")), [], [], []
    for seed in map(int, asked.seeds.split(",")):
        for name, typed in arms.items():
            run, seconds = trained(name, seed, asked.steps, typed, root)
            images = pictures(root, "val")
            found, output = scores(run, images)
            if asked.what == "codebooks":
                found |= use(run, pictures(root, "train"))
            row: dict[str, Any] = {"arm": name, "seed": seed, "steps": asked.steps, **found, "seconds": round(seconds)}
            rows.append({**row, "torch": torch.__version__, "threads": torch.get_num_threads()})
            print(rows[-1], flush=True)
            if seed == 0:
                sheet, names = [*(sheet or [images[:12]]), output[:12]], [*(names or ["pictures"]), name]
            with (HERE / f"{asked.what}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    captions = [name if i == 0 else "" for name in names for i in range(12)]
    grid(torch.cat(sheet), captions, columns=12).save(HERE / f"{asked.what}.png")


if __name__ == "__main__":
    main()
