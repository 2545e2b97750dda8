"""Six samplers from the same noise: their jumps to x0, and how far they end from the exact solution.

    python experiments/005_stable_diffusion/film_strips.py RUN      # a run of experiment=quickstart

Ten steps each on the sampler's own grid. `rms` is between last latents and those of 400 steps of DPM-Solver++(2M) on
even log-SNR from the same noise (times the deviation of standardised latents, 1).
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ldm import Pipeline
from ldm.diffusion.grids import logsnr
from ldm.pictures import grid

SAMPLERS = ["ddim", "euler", "dpmpp_2m", "unipc", "pndm", "euler_ancestral"]
PROMPT = "a large red star at the left on a green background"
HERE = Path(__file__).parent


def main(run: str) -> None:
    torch.set_num_threads(1)
    pipe = Pipeline.load(run)
    fine = replace(pipe.request(PROMPT, num_steps=400, guidance=1.5, sampler="dpmpp_2m"), spacing=logsnr)
    *_, last = pipe.sampler.steps(fine)
    exact, exact_picture = last.x_next, pipe.decode(last.x_next)
    pictures, labels, rows = [], [], []
    for name in SAMPLERS:
        row = {"sampler": name}
        for n in (10, 20, 40, 80):
            steps = list(pipe.steps(PROMPT, num_steps=n, guidance=1.5, sampler=name))
            row[f"rms_{n}"] = f"{(steps[-1].x_next - exact).square().mean().sqrt():.3f}"
            if n == 10:
                shown = [steps[0], *steps[-9:]]  # PNDM calls the network twice for its first step
                pictures += [pipe.decode(step.x0) for step in shown] + [pipe.decode(steps[-1].x_next)]
                labels += [f"{name} {step.level.ratio:.2g}" for step in shown] + ["drawn"]
        rows.append(row)
        print(row, flush=True)
    pictures.append(exact_picture)
    labels.append("400 steps")
    grid(torch.cat(pictures), labels, columns=11, side=64).save(HERE / "film_strips.png", optimize=True)
    with (HERE / "film_strips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
