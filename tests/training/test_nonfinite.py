"""A loss that is no number is noticed when it is read, before anything is saved; or its step is left out."""

import json

import pytest
import torch
from ranks import on_ranks
from tiny_training import Spy, config, fingerprint, train_watched

from ldm.checkpoints.folder import all_folders
from ldm.training.distributed import processes
from ldm.training.module import Diverged
from ldm.training.run.fit import train_run

pytestmark = pytest.mark.slow


class Poison(Spy):
    """Makes the latents of some optimizer steps no numbers, in the first micro-batch."""

    decides = False

    def __init__(self, steps, rank=0):
        super().__init__()
        self.steps, self.rank, self.poisoned = steps, rank, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if trainer.global_step + 1 in self.steps and first and trainer.global_rank == self.rank:
            batch["latent"].fill_(torch.nan)
            self.poisoned += batch["key"]


def asked(latents, *overrides):
    often = "callbacks.checkpoints.every_n_steps=4"
    return config(f"shards={latents}", "max_steps=8", often, "callbacks.losses.every_n_steps=100", *overrides)


def test_nothing_is_saved_after_a_loss_that_is_no_number(latents, tmp_path, monkeypatch):
    with pytest.raises(Diverged, match=r"training loss is nan at step 6; the last good"):
        train_watched(asked(latents), tmp_path / "run", monkeypatch, Poison({6}))
    assert [f.name for f in all_folders(tmp_path / "run")] == ["step-00000004"]


def test_gradients_that_are_no_numbers_are_noticed_before_their_weights_are_saved(latents, tmp_path, monkeypatch):
    class Overflow(Spy):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step + 1 == 4:
                next(pl_module.model.parameters()).grad.fill_(torch.inf)

    with pytest.raises(Diverged, match="norm of the gradients is inf at step 4"):
        train_watched(asked(latents), tmp_path / "run", monkeypatch, Overflow())
    assert not all_folders(tmp_path / "run")


def test_steps_are_left_out_and_their_pictures_named(latents, tmp_path, monkeypatch):
    spy, skip = Poison({3, 4}), "callbacks.skip_nonfinite.in_a_row=2"
    keep = ["callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep_last=null", "accumulate=2", "ema=none"]
    train_watched(asked(latents, skip, *keep), tmp_path / "run", monkeypatch, spy)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    skips = [e for e in events if e["event"] == "skip"]
    assert [(e["step"], e["skipped"]) for e in skips] == [(3, 1), (4, 2)]
    assert [key for e in skips for key in e["keys"]] == spy.poisoned, "of the micro-batch, not of the step"
    prints = [fingerprint(folder) for folder in all_folders(tmp_path / "run")]
    assert prints[1] == prints[2] == prints[3] != prints[4], "weights and the optimizer's state, its count of steps too"
    assert len(prints) == 8


def test_too_many_in_a_row_end_the_run(latents, tmp_path, monkeypatch):
    with pytest.raises(Diverged, match="of 2 steps in a row, up to step 6, are no numbers"):
        skip = asked(latents, "callbacks.skip_nonfinite.in_a_row=1")
        train_watched(skip, tmp_path / "run", monkeypatch, Poison({2, 5, 6, 7}))


def test_two_processes_leave_out_the_same_step(latents, tmp_path):
    def train(rank):
        with processes.together(60), pytest.MonkeyPatch.context() as patch:
            spy = Poison({2}, rank=1)
            skip = asked(latents, "callbacks.skip_nonfinite.in_a_row=1", "trainer.strategy=auto", "max_steps=3")
            train_watched(skip, tmp_path / "run", patch, spy)
            return spy.poisoned

    first, second = on_ranks(train, seconds=120)
    assert first.value == [] and len(second.value) == 2, (first, second)
    (skip,) = [e for e in map(json.loads, (tmp_path / "run" / "events.jsonl").open()) if e["event"] == "skip"]
    assert (skip["step"], skip["keys"]) == (2, second.value)


def test_a_negative_number_is_refused(latents, tmp_path):
    from ldm.errors import ConfigError

    with pytest.raises(ConfigError, match="in_a_row=-1: must be at least 0"):
        train_run(asked(latents, "callbacks.skip_nonfinite.in_a_row=-1"), lambda digest: tmp_path / "run")
