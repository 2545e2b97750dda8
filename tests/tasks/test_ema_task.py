"""task=ema: a folder a length, which any task loads; what cannot be is one line."""

import csv

import pytest
import torch
from commands import here
from PIL import Image
from safetensors.torch import load_file
from tiny_training import config, make_data

from ldm import Pipeline
from ldm.checkpoints.folder import all_folders, find
from ldm.training.run.fit import train_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema")
    latents = make_data(folder)[2]
    often = ["callbacks.snapshots.every_n_steps=2", "callbacks.checkpoints.every_n_steps=4"]
    for name, ema in (("power", "ema=power"), ("plain", "ema=decay")):
        train_run(config(f"shards={latents}", "max_steps=8", ema, *often), lambda digest, name=name: folder / name)
    return folder


def test_a_kept_length_is_the_runs_own_and_others_are_near(trained):
    run = trained / "power"
    done = here("task=ema", f"checkpoint={run}", "length=0.05", cwd=trained)
    assert done.returncode == 0, done.stderr
    made, own = (load_file(f / "unet.ema.safetensors") for f in (find(run / "lengths/0.05"), all_folders(run)[-1]))
    assert made.keys() == own.keys()
    for name in own:
        torch.testing.assert_close(made[name], own[name], rtol=1e-4, atol=1e-5)
    assert Pipeline.load(run / "lengths/0.05").config["max_steps"] == 8
    earlier = here("task=ema", f"checkpoint={run}/checkpoints/step-00000004", "output=at4", cwd=trained)
    assert earlier.returncode == 0 and find(trained / "at4/0.1").is_dir(), earlier.stderr


def test_several_lengths_are_scored_in_one_command(trained):
    few = ["eval_images=2", "num_steps=2", "metric=shapes", "optimized_metric=seen/all"]
    done = here(
        "task=ema", f"checkpoint={trained / 'power'}", "length=[0.2,0.05,0.1]", *few, "output=many", cwd=trained
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((trained / "many/scores.csv").open()))
    assert [float(row["length"]) for row in rows] == [0.05, 0.1, 0.2] and "seen/all/low" in rows[0]
    assert Image.open(trained / "many/seen_all.png").size > (100, 100)


@pytest.mark.parametrize(
    ("run", "length", "said"),
    [
        ("plain", "0.1", "has no snapshots of its averages: train with ema=power"),
        ("power", "0.4", "length=0.4 must lie in (0, 0.28]"),
        ("power", "[]", "give a number, or a list of them"),
        ("power", "wide", "give a number, or a list of them"),
        ("nowhere", "0.1", "there is nothing at this path"),
    ],
)
def test_what_cannot_be_is_said(trained, run, length, said):
    done = here("task=ema", f"checkpoint={trained / run}", f"length={length}", cwd=trained)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
