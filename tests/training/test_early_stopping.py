"""Lightning's own callbacks and loops find what a run logs, and may end it."""

import json

import lightning as L
import pytest
from commands import metrics
from ranks import command, on_ranks
from tiny_training import Killed, Spy, config, make_data, train_watched

import ldm.training.run.fit as training_run
from ldm.checkpoints.folder import all_folders
from ldm.training.callbacks.validation import validate
from ldm.training.run.fit import train_run

pytestmark = pytest.mark.slow
STOP = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 2, "
STOP += "min_delta: 9}"
BASE = ["max_steps=40", "callbacks.validation.every_n_steps=2", "callbacks.checkpoints.every_n_steps=3"]
LAST = 6  # the first validation is the best; the two after it are no better by 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def status(path):
    return json.loads((path / "status.json").read_text())


def test_a_run_that_stopped_early_is_saved_validated_once_and_finished(data, tmp_path):
    asked = config(f"shards={data[2]}", *BASE, STOP)
    finished = train_run(asked, lambda digest: tmp_path / "run")
    assert finished.trained and finished.step == LAST
    assert all_folders(finished.path)[-1].name.endswith(str(LAST))
    rows = metrics(finished.path)
    assert [step for step, row in rows.items() if "val/loss" in row] == [2, 4, 6]
    assert status(finished.path)["state"] == "finished" and status(finished.path)["step"] == LAST
    assert (finished.path / "images" / f"step-{LAST:08d}_samples.png").is_file(), "what is due at the last step"
    again = train_run(asked, lambda digest: tmp_path / "run")
    assert not again.trained and again.step == LAST


def test_an_autoencoder_that_stopped_early_has_measured_latents(data, tmp_path):
    asked = config("module=autoencoder", f"shards={data[0]}", *BASE, STOP)
    run = train_run(asked, lambda digest: tmp_path / "run")
    assert run.step == LAST
    drawn = {p.name.split("_", 1)[1] for p in (run.path / "images").glob("*.png")}
    assert drawn == {"reconstructions.png"}, "what watches latent diffusion is left out"
    diffusion = config(f"shards={data[0]}", f"checkpoint={run.path}", "max_steps=1")
    assert train_run(diffusion, lambda digest: tmp_path / "diffusion").step == 1, "refused where they are not measured"


@pytest.mark.parametrize("killed", [("batch_start", 5), ("batch_end", LAST)])
def test_a_killed_run_stops_at_the_same_step(data, tmp_path, monkeypatch, killed):
    asked = config(f"shards={data[2]}", *BASE, STOP)
    with pytest.raises(Killed):
        train_watched(asked, tmp_path / "run", monkeypatch, Spy(die_at=killed))
    resumed = train_run(asked, lambda digest: tmp_path / "run")
    assert resumed.trained and resumed.step == LAST
    assert [step for step, row in metrics(resumed.path).items() if "val/loss" in row] == [2, 4, 6]


def test_a_run_killed_after_its_last_checkpoint_does_not_go_on(data, tmp_path):
    asked = config(f"shards={data[2]}", *BASE, STOP)
    path = train_run(asked, lambda digest: tmp_path / "run").path
    (path / "status.json").write_text(json.dumps({"state": "running", "step": LAST}))
    again = train_run(asked, lambda digest: tmp_path / "run")
    assert again.step == LAST and status(path)["state"] == "finished"


def test_min_steps_hold_a_stop_back(data, tmp_path):
    asked = config(f"shards={data[2]}", *BASE, STOP, "+trainer.min_steps=9", "+trainer.min_epochs=0")
    finished = train_run(asked, lambda digest: tmp_path / "run")
    assert finished.step == 9 and [p.name[-1] for p in all_folders(finished.path)] == ["6", "9"]


class Metrics(L.Callback):
    def on_validation_end(self, trainer, pl_module):
        self.seen = {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_what_is_logged_is_in_callback_metrics_and_validate_gives_the_same(data, tmp_path, monkeypatch):
    spy, kept = Metrics(), {}
    fit = L.Trainer.fit

    def watched_fit(trainer, module, datamodule, ckpt_path):
        fit(trainer, module, datamodule=datamodule, ckpt_path=ckpt_path)
        kept["ours"] = validate(trainer, module)
        plain = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        kept["lightning"] = plain.validate(module, datamodule=datamodule, verbose=False)[0]

    monkeypatch.setattr(L.Trainer, "fit", watched_fit)
    asked = config(f"shards={data[2]}", "max_steps=2", "data.validation_samples=5", "data.validation_batch_size=3")
    path = train_watched(asked, tmp_path / "run", monkeypatch, spy).path
    row = metrics(path)[2]
    for name in ("val/loss", "train/loss", "train/learning_rate"):
        assert spy.seen[name] == pytest.approx(row[name], rel=1e-6)
    error = kept["ours"].pop("val/loss_standard_error")
    assert error > 0 and kept["lightning"] == pytest.approx(kept["ours"], rel=1e-5)


class Logs(L.Callback):
    """Writes a line at every step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.loggers[0].log_metrics({"mine": 1.0}, step=trainer.global_step)


def test_checkpoints_act_last_wherever_they_stand(data, tmp_path, monkeypatch):
    asked = config(f"shards={data[2]}", "max_steps=4", "callbacks.checkpoints.every_n_steps=2")
    asked["callbacks"] = {"checkpoints": asked["callbacks"]["checkpoints"], **asked["callbacks"]}
    assert next(iter(asked["callbacks"])) == "checkpoints"
    original = training_run.build

    def followed(node, path="config", **kwargs):
        if path == "trainer":
            kwargs["callbacks"] = [*kwargs["callbacks"], Logs()]
        return original(node, path, **kwargs)

    monkeypatch.setattr(training_run, "build", followed)
    with pytest.raises(Killed):
        train_watched(asked, tmp_path / "run", monkeypatch, Spy(die_at=("batch_start", 2)))
    path = train_run(asked, lambda digest: tmp_path / "run").path
    assert [step for step, row in metrics(path).items() if "mine" in row] == [1, 2, 3, 4]


def test_no_checkpoint_callback_means_none_and_the_old_key_is_no_obstacle(data, tmp_path):
    asked = config(f"shards={data[2]}", "max_steps=1", "callbacks.checkpoints=null")
    assert all_folders(train_run(asked, lambda digest: tmp_path / "none").path) == []
    asked = config(f"shards={data[2]}", "max_steps=1", "trainer.enable_checkpointing=false")
    assert len(all_folders(train_run(asked, lambda digest: tmp_path / "old").path)) == 1


def test_two_processes_stop_at_the_same_step_from_the_command_line(data, tmp_path):
    typed = ["model=unet_tiny", "text_encoder=small_tiny", "autoencoder=kl_tiny", "trainer=ddp", "logger=none"]
    typed += [f"shards={data[2]}", "trainer.accelerator=cpu", "batch_size=2", "name=two", *BASE, STOP]
    typed += ["callbacks.samples=null", "callbacks.jump_to_x0=null"]
    run, written = tmp_path / "outputs/two", []
    for _ in range(2):  # the second time it was finished before
        ranks = on_ranks(command(*typed, cwd=tmp_path))
        assert [r.code for r in ranks] == [0, 0], ranks[0].err[-2000:]
        assert status(run)["stopped_early"] is True and status(run)["step"] == 6
        written.append((run / "events.jsonl").read_text())
    assert written[0] == written[1] and max(metrics(run)) == 6
