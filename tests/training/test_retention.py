"""Which checkpoints stay: the last ones, the best by a metric, and one every so many images."""

import pytest
from commands import here
from tiny_training import TINY, Spy, config, make_data, train_watched

from ldm.checkpoints.folder import all_folders
from ldm.errors import ConfigError
from ldm.training.callbacks.saving import Checkpoints


class Trainer:
    """What Checkpoints asks of one."""

    is_global_zero, max_steps, should_stop, callbacks, lightning_module = True, 100, False, (), None

    def __init__(self, directory, values=()):
        self.directory, self.callback_metrics, self.values, self.global_step = directory, {}, dict(values), 0

    def save_checkpoint(self, folder):
        folder.mkdir(parents=True)


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({"keep_last": 2}, [9, 10]),
        ({"keep_last": None}, list(range(1, 11))),
        ({"keep_last": 1, "keep_best": "val/loss"}, [3, 10]),
        ({"keep_last": 1, "keep_best": "val/loss", "best": "highest"}, [5, 10]),
        ({"keep_last": 1, "keep_every_n_images": 4}, [4, 8, 10]),
        ({"keep_last": 1, "keep_every_n_images": 3, "keep_best": "val/loss"}, [3, 6, 9, 10]),
        ({"keep_last": 2, "keep_every_n_images": 1000}, [9, 10]),
    ],
)
@pytest.mark.parametrize("resumed", [None, 4, 9])
def test_those_stay(tmp_path, monkeypatch, options, stay, resumed):
    """Also of a run that was stopped between two of them: what was best before is known."""
    monkeypatch.setattr(Checkpoints, "directory", tmp_path / "checkpoints")
    values = {2: 0.7, 3: 0.2, 4: float("nan"), 5: 0.9, 6: 0.4}
    trainer = Trainer(tmp_path)
    callback = Checkpoints(every_n_steps=1, **options)
    callback._io = None
    for step in range(1, 11):
        trainer.global_step = step
        if step in values:
            trainer.callback_metrics = {"val/loss": values[step]}
        callback._save(trainer)
        if step == resumed:
            state, callback = callback.state_dict(), Checkpoints(every_n_steps=1, **options)
            callback.load_state_dict(state)
            callback._io, trainer.callback_metrics = None, {}
    assert [int(f.name.split("-")[1]) for f in all_folders(tmp_path)] == stay


def test_a_run_keeps_its_best(tmp_path, monkeypatch):
    latents = make_data(tmp_path)[2]
    asked = [f"shards={latents}", "max_steps=6", "callbacks.validation.every_n_steps=1", "optimizer.lr=1e-1"]
    asked += ["callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep_last=1", "lr_scheduler=constant"]
    asked += ["callbacks.checkpoints.keep_best=val/loss", "callbacks.samples=null", "callbacks.jump_to_x0=null"]

    class Losses(Spy):
        def on_validation_end(self, trainer, pl_module):
            values[trainer.global_step] = float(trainer.callback_metrics["val/loss"])

    values = {}
    train_watched(config(*asked), tmp_path / "run", monkeypatch, Losses())
    best = min(values, key=values.get)
    assert [int(f.name.split("-")[1]) for f in all_folders(tmp_path / "run")] == sorted({best, 6})


def test_a_metric_that_nobody_logs_is_refused(tmp_path):
    latents = make_data(tmp_path)[2]
    done = here(*TINY, f"shards={latents}", "callbacks.checkpoints.keep_best=val/los", cwd=tmp_path)
    assert done.returncode == 2 and "keep_best=val/los: nothing of this name" in done.stderr
    assert "Did you mean 'val/loss'" in done.stderr and not list(tmp_path.glob("outputs/*/run.json"))


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_every_n_images": 0}, {"signals_every_n_steps": 0}])
def test_what_cannot_be(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=0: at least 1"):
        Checkpoints(**wrong)
