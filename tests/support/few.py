"""A tiny base model of ours, a few bare pictures, and experiments that go on from the one with the others."""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from PIL import Image, ImageDraw
from tiny_training import CONF, config, make_data

from ldm.config.schema import register
from ldm.tasks.work.train import train
from ldm.training.run.fit import train_run

SHORT = ["image_size=32", "batch_size=2", "max_steps=3", "logger=none", "trainer=debug", "num_steps=2", "guidance=1.5"]
SHORT += ["callbacks.losses.every_n_steps=1", "callbacks.progress.every_n_steps=1000", "callbacks.jump_to_x0=null"]
SHORT += ["callbacks.samples=null", "export=null"]


def make_base(folder: Path) -> Path:
    """A run of every part, tiny, one step old, beside its shards, autoencoder and latents."""
    _, _, latents = make_data(folder)
    return train_run(config(f"shards={latents}", "max_steps=1"), lambda digest: folder / "base").path


def make_pictures(folder: Path, n: int) -> Path:
    """n bare pictures of several sizes, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image = Image.new("RGB", (40 + 9 * i, 50), (30 * i % 256, 120, 220 - 20 * i % 200))
        ImageDraw.Draw(image).ellipse((6, 4, 30, 28), fill=(250, 20 * i % 256, 10))
        image.save(folder / f"{i}.png")
    return folder


def composed(experiment: str, *overrides: str):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"experiment={experiment}", *SHORT, *overrides])


def run(experiment: str, base: Path, outputs: Path, *overrides: str, name: str = "mine") -> Path:
    """The run directory of an experiment, trained in this process."""
    train(composed(experiment, f"checkpoint={base}", f"outputs={outputs}", f"name={name}", *overrides))
    return outputs / name


def plain_of(run: Path) -> dict:
    """The resolved configuration that a run directory keeps."""
    return yaml.safe_load((run / "config.yaml").read_text())
