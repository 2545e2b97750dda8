"""What arms of a sweep share, so that they can be compared in pairs; and how one of them is stopped by a pruner."""

import optuna
import pytest
import torch
from tiny_training import Spy, config, train_watched

from ldm.training.callbacks import pruning
from ldm.training.callbacks.saving import Interrupted
from ldm.training.randomness import Draws
from ldm.training.run.logging import last_metrics

SHORT = ["max_steps=4", "callbacks.jump_to_x0=null", "callbacks.samples=null", "callbacks.validation=null"]


class Beginning(Spy):
    """Keeps what is trained at its start."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}


@pytest.mark.slow
def test_arms_of_one_seed_start_alike_and_meet_the_same_pictures_and_noise(latents, tmp_path, monkeypatch):
    drawn, normal = [], Draws.normal

    def kept(self, *args):
        drawn[-1].append(normal(self, *args))
        return drawn[-1][-1]

    monkeypatch.setattr(Draws, "normal", kept)
    spies = []
    for name, changes in (("a", []), ("b", ["weighting=min_snr", "optimizer.lr=0.01"]), ("c", ["seed=1"])):
        spies.append(Beginning())
        drawn.append([])
        train_watched(config(f"shards={latents}", *SHORT, *changes), tmp_path / name, monkeypatch, spies[-1])
    a, b, other = spies
    assert a.weights.keys() == b.weights.keys() and all(torch.equal(v, b.weights[k]) for k, v in a.weights.items())
    assert a.keys == b.keys and len(a.keys) == 4
    assert len(drawn[0]) >= 4 and all(torch.equal(x, y) for x, y in zip(drawn[0], drawn[1], strict=True))
    assert a.keys != other.keys and not torch.equal(drawn[0][0], drawn[2][0])
    assert last_metrics(tmp_path / "a/metrics.jsonl") != last_metrics(tmp_path / "b/metrics.jsonl")


@pytest.mark.slow
def test_an_arm_that_is_worse_than_others_were_is_saved_and_stopped(latents, tmp_path):
    """The study is told every value that metrics.jsonl has, goes by it, and another run of the sweep is left alone."""
    from ldm.training.run.fit import train_run

    storage = f"sqlite:///{tmp_path}/study.db"
    study = pruning.open_study("s", storage, optuna.pruners.NopPruner(), "minimize")
    for best in (0.0, 0.0):
        trial = study.ask()
        for step in (1, 2, 3, 4):
            trial.report(best if step >= 2 else 100.0, step)
        study.tell(trial, best)
    trial = study.ask()
    trial.set_user_attr("arm", "arm")
    told = f"study: s, storage: '{storage}', metric: train/loss, startup_trials: 2"
    typed = f"+callbacks.pruning={{_target_: ldm.training.callbacks.pruning.Pruning, {told}}}"
    settings = config(f"shards={latents}", *SHORT, typed)
    with pytest.raises(Interrupted, match="pruned after step 2; saved in") as stopped:
        train_run(settings, lambda digest: tmp_path / "arm")
    assert stopped.value.exit_code == 4 and (stopped.value.folder / "manifest.json").is_file()
    logged = last_metrics(tmp_path / "arm/metrics.jsonl")["train/loss"]
    reported = study.trials[-1].intermediate_values
    assert list(reported) == [1, 2] and reported[2] == pytest.approx(logged)
    assert train_run(settings, lambda digest: tmp_path / "another").step == 4
