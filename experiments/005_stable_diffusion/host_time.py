"""Host time per sampling step outside the network, ours against diffusers' pipeline, in one run.

    python experiments/005_stable_diffusion/host_time.py [REPEATS]

Both load the same small folder (tests/support/published.py) and draw pictures of 512x512 (latents 4x64x64) with
guidance 7.5; their U-Nets are replaced by one that returns a tensor made before, so that what is left is the loop. One
thread; processor time, so that other work on a shared machine is not counted.
`arithmetic` is DDIM's textbook formulas written out, with all numbers known beforehand.
"""

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch

from ldm import Pipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import published  # noqa: E402

SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
FEW, MANY = 10, 50  # their difference is free of what a picture costs once


class StandIn(torch.nn.Module):
    """A U-Net to both libraries: the same output whatever the input."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.config = getattr(unet, "config", None)
        self.dtype, self.device, self.in_channels = torch.float32, torch.device("cpu"), 4
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.output = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))

    def forward(self, sample, timestep, cond=None, return_dict=None, **theirs):
        return self.output if return_dict is None else (self.output,)


def main(repeats: int = 41) -> None:
    torch.set_num_threads(1)
    made = published.sd1()  # clip_sample off, as Stable Diffusion's own scheduler files have it
    made.scheduler = diffusers.DDIMScheduler(
        **published.TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    folder = published.save(made, Path(tempfile.mkdtemp()) / "sd1")
    ours = Pipeline.load(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    ours.sampler.denoiser.model = StandIn(ours.sampler.denoiser.model)
    theirs.unet = StandIn(theirs.unet)
    rows = []
    for sampler, cls in SAMPLERS.items():
        theirs.scheduler = cls.from_config(theirs.scheduler.config)
        draws = {"arithmetic": arithmetic} if sampler == "ddim" else {}
        draws |= {"ours": lambda n, s=sampler: draw_ours(ours, s, n), "diffusers": lambda n: draw_theirs(theirs, n)}
        seconds = measured(draws, repeats)
        step = {who: (seconds[who, MANY] - seconds[who, FEW]) / (MANY - FEW) for who in draws}
        rows.append(
            {
                "sampler": sampler,
                "arithmetic_step_ms": "",
                **{f"{who}_step_ms": f"{1000 * step[who]:.3f}" for who in draws},
                "step_ratio": f"{step['ours'] / step['diffusers']:.3f}",
                **{f"{who}_picture_ms": f"{1000 * seconds[who, MANY]:.1f}" for who in draws},
                "picture_ratio": f"{seconds['ours', MANY] / seconds['diffusers', MANY]:.3f}",
            }
        )
        print(rows[-1], flush=True)
    with (Path(__file__).parent / "host_time.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measured(draws, repeats):
    """(who, steps) -> median seconds a picture; the candidates take turns, so that the machine's moods hit all."""
    times = {(who, n): [] for who in draws for n in (FEW, MANY)}
    for repeat in range(repeats + 2):
        for who, n in times:
            start = time.process_time()
            draws[who](n)
            if repeat > 1:  # two rounds to warm up
                times[who, n].append(time.process_time() - start)
    return {key: statistics.median(values) for key, values in times.items()}


@torch.no_grad()
def arithmetic(n):
    x = torch.randn(1, 4, 64, 64)
    both, timestep = torch.randn(2, 4, 64, 64), 500.0
    for _ in range(n):
        torch.cat([x, x]), torch.full((2,), timestep)
        negative, positive = both.chunk(2)
        output = negative + 7.5 * (positive - negative)
        x0 = 1.1 * x - 0.4 * output
        x = 0.9 * x + 0.1 * x0
    return x


def draw_ours(pipe, sampler, n):
    for step in pipe.steps("a red cat", height=512, width=512, num_steps=n, guidance=7.5, seed=0, sampler=sampler):
        last = step.x_next
    return last


def draw_theirs(pipe, n):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a red cat", height=512, width=512, num_inference_steps=n, generator=generator, output_type="latent"
    ).images


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
