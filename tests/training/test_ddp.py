"""Two processes are one process accumulating two: losses, weights, one W&B run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, metrics
from few import SHORT, make_pictures, run
from PIL import Image
from ranks import command, free_port, on_ranks
from safetensors.torch import load_file
from tiny_training import make_data

from ldm.checkpoints.folder import all_folders
from ldm.training.randomness import Draws, ahead, normal, stratified, uniform

BASE = ["model=unet_tiny", "text_encoder=small_tiny", "autoencoder=kl_tiny", "max_steps=6", "batch_size=4"]
BASE += ["callbacks.losses.every_n_steps=1", "callbacks.validation.every_n_steps=3", "data.validation_samples=4"]
BASE += ["callbacks.jump_to_x0.num_steps=3", "callbacks.samples.num_steps=2", "noises_per_image=2"]


def test_draws_depend_on_the_position_alone():
    one = Draws(seed=0, batch_size=4, accumulate=2)
    two = [Draws(seed=0, batch_size=4, rank=r, world_size=2) for r in range(2)]
    assert [one.positions(i, 4) for i in range(2)] == [two[r].positions(0, 4) for r in range(2)]
    whole = normal((3,), 0, "noise", 5, range(8))
    parts = torch.cat([normal((3,), 0, "noise", 5, d.positions(0, 4)) for d in two])
    assert torch.equal(whole, parts)
    u = uniform(0, "times", 5, range(10_000))
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    t = stratified(0, "times", 5, range(64), 64)
    assert torch.equal((t * 64).floor().sort().values, torch.arange(64, dtype=torch.float64))
    assert not torch.equal(t, stratified(0, "times", 6, range(64), 64))


def test_noise_drawn_ahead_is_the_noise_and_is_guessed_right(monkeypatch):
    """A step asks for what the thread has begun: of the next micro-batch, step and share, whatever the geometry."""
    asked = []
    real = ahead._thread.submit
    monkeypatch.setattr(ahead._thread, "submit", lambda draw, *args: asked.append(args) or real(draw, *args))
    for draws in (Draws(batch_size=2, accumulate=2, rank=1, world_size=2, seed=3), Draws(batch_size=3, seed=1)):
        for batch in range(5):
            step, positions = batch // draws.accumulate, draws.positions(batch, draws.batch_size)
            pairs = range(positions.start * 2, positions.stop * 2)
            made = draws.normal((4, 2, 2), "noise", step, pairs)
            assert torch.equal(made, normal((4, 2, 2), draws.seed, "noise", step, pairs))
            if batch:
                assert asked[-2] == ((4, 2, 2), draws.seed, "noise", step, pairs)
    begun = len(asked)
    assert torch.equal(draws.normal((3,), "noise", 0, [5, 2]), normal((3,), 1, "noise", 0, [5, 2]))  # validation's
    assert len(asked) == begun


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates_two(tmp_path):
    _, _, latents = make_data(tmp_path)
    script = Path(__file__).parents[2] / "experiments/011_launching/torchrun_many_hosts.sh"
    environment = {**ENVIRONMENT, "HOSTS": "1", "FIRST": "127.0.0.1", "PROCESSES": "2", "PORT": str(free_port())}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = ["-m", "ldm.run", *BASE, f"shards={latents}"]
    two = subprocess.run(
        ["bash", str(script), *run[2:], "trainer.accelerator=cpu", "name=two"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    one = subprocess.run(
        [sys.executable, *run, "trainer=debug", "accumulate=2", "name=one", "logger=none"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert one.returncode == 0, one.stderr[-3000:]
    first, second = (metrics(tmp_path / "outputs" / n) for n in ("one", "two"))
    assert first.keys() == second.keys()
    for step, values in first.items():
        assert values == pytest.approx(second[step], rel=1e-4, abs=1e-5), step
    a, b = (load_file(all_folders(tmp_path / "outputs" / n)[-1] / "unet.ema.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert len(list((tmp_path / "outputs/two/wandb").glob("offline-run-*"))) == 1
    pictures = [{p.name: p for p in (tmp_path / "outputs" / n / "images").glob("*.png")} for n in ("one", "two")]
    assert pictures[0].keys() == pictures[1].keys() and len(pictures[0]) > 3
    for name, one in pictures[0].items():  # every process drew a share
        a, b = (np.asarray(Image.open(p), dtype=float) for p in (one, pictures[1][name]))
        assert a.shape == b.shape and np.abs(a - b).mean() < 0.05, name
    # The digest is the same: where a run happens is not what it is.
    digests = {json.loads((tmp_path / "outputs" / n / "run.json").read_text())["digest"] for n in ("one", "two")}
    assert len(digests) == 1 and "RANK" not in os.environ


SAYS = 'instance_prompt="a photo of a <new> cat"'
PLAIN = 'instance_prompt="a photo of a cat"'
ADAPTERS = {
    "lora": [
        "adapter=[lora]",
        PLAIN,
        "adapter.lora.dropout=0.5",
        "adapter.lora.text_encoder=true",
        "adapter.lora.lr=1e-2",
    ],
    "dora": ["adapter=[lora]", PLAIN, "adapter.lora.dora=true", "adapter.lora.layers=all", "adapter.lora.lr=1e-2"],
    "word": ["adapter=[textual_inversion]", SAYS, "adapter.textual_inversion.lr=1e-2"],
    "hypernetwork": [
        "adapter=[hypernetwork]",
        PLAIN,
        "adapter.hypernetwork.dropout=[0,0.3,0]",
        "adapter.hypernetwork.lr=1e-2",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_with_dropout_on_two_processes(tmp_path, sd1_folder, kind):
    """Also what dropout leaves out is decided by the place in the step, not by the process."""
    images = make_pictures(tmp_path / "images", 8)
    typed = [*ADAPTERS[kind], f"images={images}", "callbacks.validation=null", "batch_size=2", "lr_scheduler=constant"]
    (tmp_path / "one").mkdir()
    run("finetune", sd1_folder, tmp_path / "one", *typed, "accumulate=2")
    here = [
        "trainer=ddp",
        "trainer.accelerator=cpu",
        f"outputs={tmp_path}/two",
        "name=mine",
        f"checkpoint={sd1_folder}",
    ]
    two = on_ranks(command("experiment=finetune", *SHORT, *(t.replace('"', "") for t in typed), *here, cwd=tmp_path))
    assert [r.code for r in two] == [0, 0], two[0].err[-2000:] + two[1].err[-2000:]
    first, second = metrics(tmp_path / "one/mine"), metrics(tmp_path / "two/mine")
    assert first.keys() == second.keys() and len(first) == 3
    for step, values in first.items():
        assert values == pytest.approx(second[step], rel=1e-6), step
