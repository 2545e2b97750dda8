"""Every scheduler x parameterization x sampler: 20 training steps, then 10 sampling steps with each sampler.

    python experiments/004_axes/run.py LATENTS [OUTPUT]

LATENTS: the quickstart's latent shards, outputs/stages/latents-*. A tiny network; what cannot be is refused in a line.
"""

import csv
import sys
import time
from itertools import product
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm import Pipeline
from ldm.config.root import conf_dir
from ldm.config.schema import register
from ldm.errors import ConfigError
from ldm.training.run.fit import train_run

PROMPTS = ["a large red star at the left on a green background", "a small blue circle on a brown background"]
FIXED = ["model=unet_tiny", "text_encoder=small_tiny", "trainer=debug", "logger=none", "batch_size=8", "max_steps=20"]
FIXED += ["autoencoder=kl_quickstart", "callbacks=default", "callbacks.jump_to_x0.num_steps=2"]
FIXED += ["callbacks.samples.num_steps=2"]


def main(latents: str, output: str = "outputs/axes") -> None:
    torch.set_num_threads(1)
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        rows = []
        for scheduler, parameterization in product(options("scheduler"), options("parameterization")):
            config = compose(
                "config",
                [*FIXED, f"shards={latents}", f"scheduler={scheduler}", f"parameterization={parameterization}"],
            )
            rows += list(arms(scheduler, parameterization, config, Path(output)))
            print(scheduler, parameterization, len(rows), flush=True)
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def arms(scheduler, parameterization, config, output):
    row = {"scheduler": scheduler, "parameterization": parameterization}
    try:
        plain = OmegaConf.to_container(config, resolve=True)
        run = train_run(plain, lambda digest: output / f"{scheduler}-{parameterization}")
    except ConfigError as error:
        yield {**row, "sampler": "all", **outcome("refused", message=str(error))}
        return
    pipe = Pipeline.load(run.path)
    for sampler in options("sampler"):
        start = time.perf_counter()
        named = None if sampler == "own" else sampler
        try:
            images = pipe.sample(PROMPTS, num_steps=10, guidance=2.0, seed=0, sampler=named)
            x0 = list(pipe.steps(PROMPTS, num_steps=10, guidance=2.0, seed=0, sampler=named))[-1].x_next
        except ConfigError as error:
            yield {**row, "sampler": sampler, **outcome("refused", message=str(error))}
            continue
        finite = bool(images.isfinite().all() and x0.isfinite().all())
        state = "finished" if finite else "not finite"
        seconds = (time.perf_counter() - start) / 2
        loss = run.metrics["train/loss"]
        yield {**row, "sampler": sampler, **outcome(state, loss, x0.std().item(), seconds)}


def outcome(state, loss="", deviation="", seconds="", message=""):
    digits = lambda v: f"{v:.4g}" if isinstance(v, float) else v  # noqa: E731
    return {
        "state": state,
        "train_loss": digits(loss),
        "x0_std": digits(deviation),
        "seconds": digits(seconds),
        "message": message,
    }


def options(group):
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


if __name__ == "__main__":
    main(*sys.argv[1:])
