"""A loader that was stopped goes on with the batch after the last one handed over, on any number of ranks."""

from pathlib import Path

import lightning as L
import pytest
import torch
from loader_data import keys, loader, module

from ldm.errors import ConfigError


@pytest.mark.parametrize(("epoch", "stop"), [(0, 5), (2, 7), (1, 12), (0, 0)])
def test_resume_continues_after_the_last_batch_handed_over(fifty: Path, epoch: int, stop: int):
    whole = loader(fifty)
    expected = [keys(whole) for _ in range(epoch + 2)]
    train = loader(fifty)
    for _ in range(epoch):
        keys(train)
    running = iter(train)
    for _ in range(stop):
        next(running)
    state = train.state_dict()
    resumed = loader(fifty)
    resumed.load_state_dict(state)
    rest = [*expected[epoch][stop:], *expected[epoch + 1]]
    if stop == 0:  # the epoch was never begun: the state is the end of the one before
        assert keys(resumed) == expected[epoch]
    else:
        assert (keys(resumed) if stop < len(train) else []) + keys(resumed) == rest


def test_resume_on_another_number_of_ranks_continues_the_same_global_batches(fifty: Path):
    train = loader(fifty, accumulate=2)
    running = iter(train)
    for _ in range(4):
        next(running)
    rest = keys(running)
    ranks = [loader(fifty, rank, 2) for rank in (0, 1)]
    for resumed in ranks:
        resumed.load_state_dict({**train.state_dict(), "batches": 4})
    assert [b for pair in zip(*map(keys, ranks), strict=True) for b in pair] == rest


@pytest.mark.parametrize("change", [{"seed": 5}, {"batch_size": 8}, {"train_samples": 40}])
def test_resume_refuses_what_changed_with_both_values(fifty: Path, change: dict):
    state = loader(fifty).state_dict()
    with pytest.raises(ConfigError, match=r"was .* when the run was saved and is .* now.*data\.resume=restart_epoch"):
        loader(fifty, **change).load_state_dict(state)
    restarted = loader(fifty, resume="restart_epoch", **change)
    restarted.load_state_dict({**state, "epoch": 3, "batches": 5})
    assert (restarted.epoch, restarted.done) == (3, 0)


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["key"]))
        return (self.weight * batch["image"].float().mean()).sum()

    def validation_step(self, batch, batch_idx):
        assert batch["valid"].dtype == torch.bool

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(path: Path, *callbacks: L.Callback, checkpoint: Path | None = None):
    toy = Toy()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=30, max_epochs=-1, callbacks=[*callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(toy, module(path, validation_fraction=0.1), ckpt_path=checkpoint, weights_only=True)
    return toy.seen


@pytest.mark.parametrize("stop", [4, 11, 15, 22])  # an epoch has 11 steps
def test_a_lightning_run_resumes_exactly(fifty: Path, tmp_path: Path, stop: int):
    whole = fit(fifty, SaveAt(stop, tmp_path / "a.ckpt"))
    assert len(whole) == 30 and whole[15][:2] == (1, 4)
    assert fit(fifty, checkpoint=tmp_path / "a.ckpt") == whole[stop:]


def test_an_abandoned_epoch_is_followed_by_the_next(fifty: Path):
    """limit_train_batches: each of Lightning's short epochs is the start of another permutation."""
    train = loader(fifty)
    next(iter(train))
    assert keys(train) == keys(second_epoch(loader(fifty)))


def second_epoch(train):
    keys(train)
    return train
