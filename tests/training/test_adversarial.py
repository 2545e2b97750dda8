"""An adversarial run: the same when killed and started again, the same in two processes, averaged on one side."""

from __future__ import annotations

import json

import pytest
import torch
import torch._functorch.config as functorch
from commands import here, metrics
from ranks import command, on_ranks
from tiny_training import TINY, Killed, Spy, config, fingerprint, make_data, train_watched

from ldm.checkpoints.folder import all_folders, find, load_parts
from ldm.checkpoints.load import load_any
from ldm.training.run.fit import train_run

ADVERSARIAL = ["module=autoencoder", "loss=[perceptual,adversarial]", "module.losses.perceptual.features=random"]
ADVERSARIAL += ["module.losses.adversarial.start=3", "module.losses.adversarial.discriminator.width=8", "ema=decay"]
ADVERSARIAL += ["max_steps=6", "lr_scheduler=constant", "callbacks.checkpoints.every_n_steps=2", "optimizer.lr=1e-3"]
ADVERSARIAL += ["callbacks.validation.every_n_steps=3", "callbacks.reconstructions.every_n_steps=6"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("adversarial"))[0]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train_run(config(*ADVERSARIAL, f"shards={shards}"), lambda digest: folder).path


def test_what_is_logged_and_saved(whole):
    """Each term by its name, the discriminator's from its start on; its weights are saved, but not averaged."""
    rows = metrics(whole)
    always = {"train/reconstruction", "train/perceptual_random", "train/kl", "train/loss"}
    begun = {f"train/{n}" for n in ("adversarial", "adversarial_weight", "discriminator", "logit_pictures")}
    assert all(always <= row.keys() for row in rows.values())
    assert all(begun <= rows[step].keys() for step in (4, 5, 6)) and not any(begun & rows[s].keys() for s in (1, 2, 3))
    files = {p.name for p in find(whole).iterdir()}
    assert {"vae.ema.safetensors", "loss_adversarial.safetensors"} <= files
    assert "loss_adversarial.ema.safetensors" not in files and "loss_perceptual.safetensors" not in files
    assert not any("discriminator" in key for key in load_any(str(whole)).autoencoder.state_dict())
    assert functorch.donated_buffer is False, "compiled, its gradients are asked twice"
    for row in (rows[step] for step in (4, 5, 6)):  # the discriminator's own loss is another's
        parts = row["train/reconstruction"] + row["train/perceptual_random"] + 1e-6 * row["train/kl"]
        adversarial = row["train/loss"] - parts
        assert adversarial == pytest.approx(0.5 * row["train/adversarial"] * row["train/adversarial_weight"], abs=2e-5)


def test_a_discriminator_begins_as_it_was_drawn(whole, shards):
    """Neither its weights nor its moments move before the start."""
    before, after = (load_parts(folder, "raw") for folder in (all_folders(whole)[-2], all_folders(whole)[-1]))
    assert before.keys() == after.keys() == {"vae", "loss_adversarial"}
    assert any(not torch.equal(before["loss_adversarial"][k], v) for k, v in after["loss_adversarial"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [("batch_end", 1), ("batch_start", 3), ("backward", 3), ("batch_end", 4), ("batch_start", 5)]
)
def test_killed_and_started_again_is_the_same_run(whole, shards, tmp_path, monkeypatch, point):
    """Before, at and after the start, to the last bit: weights, averages, moments of both sides, logged values."""
    values = config(*ADVERSARIAL, f"shards={shards}")
    with pytest.raises(Killed):
        train_watched(values, tmp_path / "run", monkeypatch, Spy(point))
    again = train_watched(values, tmp_path / "run", monkeypatch, Spy()).path
    assert fingerprint(all_folders(again)[-1]) == fingerprint(all_folders(whole)[-1])
    assert metrics(again) == metrics(whole)


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates_two(shards, tmp_path):
    asked = [*TINY, *ADVERSARIAL, f"shards={shards}", "module.losses.adversarial.r1=1"]
    asked += ["trainer.gradient_clip_val=0.5", "module.losses.adversarial.discriminator.norm=none", "name=mine"]
    asked += ["module.losses.adversarial.lecam=0.1", "perturbation=[equivariance,channel_dropout]"]
    asked += ["callbacks.reconstructions=null", f"outputs={tmp_path}/{{world}}", "trainer.accelerator=cpu"]

    def typed(world: str, *more: str) -> list[str]:
        return [*(t.replace("{world}", world) for t in asked), *more]

    ranks = on_ranks(command(*typed("two", "trainer=ddp"), cwd=tmp_path))
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert here(*typed("one", "accumulate=2"), cwd=tmp_path).returncode == 0
    one, two = tmp_path / "one/mine", tmp_path / "two/mine"
    first, second = metrics(one), metrics(two)
    assert first.keys() == second.keys()
    for step, values in first.items():
        assert values == pytest.approx(second[step], rel=1e-6, abs=1e-7), step
    a, b = (load_parts(find(run), "raw") for run in (one, two))
    for part in a:
        for key, value in a[part].items():
            torch.testing.assert_close(value, b[part][key], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_steps_are_counted_once_and_losses_fall(shards, tmp_path):
    """40 steps are 40 of both sides; the discriminator learns to tell."""
    asked = [*ADVERSARIAL, f"shards={shards}", "max_steps=40", "module.losses.adversarial.start=10", "accumulate=2"]
    run = train_run(config(*asked, "callbacks.checkpoints.every_n_steps=40"), lambda digest: tmp_path / "run").path
    assert json.loads((run / "status.json").read_text())["step"] == 40
    rows = metrics(run)
    assert rows[40]["train/reconstruction"] < rows[1]["train/reconstruction"]
    early, late = rows[11]["train/discriminator"], rows[40]["train/discriminator"]
    assert late < early and rows[40]["train/logit_pictures"] > rows[40]["train/logit_outputs"]
