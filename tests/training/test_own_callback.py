"""Callbacks of one's own: what they log stands at its step, and what they do not decide makes no run again."""

import lightning as L
import pytest
from commands import metrics
from conf_nodes import composed
from tiny_training import Killed, Spy, config, make_data, train_watched

from ldm.config.root import plain
from ldm.errors import ConfigError
from ldm.tasks.work.stages import Stages
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.run.fit import train_run
from ldm.training.run.identity import decisive

STAGES = ("autoencoder", "diffusion")


class Logs(L.Callback):
    """Writes the step as Lightning's users do, and once at the end of it all."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("mine", float(trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("whole", float(trainer.global_step))


class Watches(L.Callback):
    watches = LatentDiffusion


class Silent(L.Callback):
    decides = False


class Misnamed(L.Callback):
    watches = "latent_diffusion"


def with_callback(name, stage):
    asked = composed("experiment=quickstart", f"+callbacks.mine={{_target_: {__name__}.{name}}}")
    return decisive(plain(Stages(asked).configured(stage)))


def test_a_callback_decides_the_runs_that_it_is_beside_unless_it_says_no():
    usual = {stage: decisive(plain(Stages(composed("experiment=quickstart")).configured(stage))) for stage in STAGES}
    assert {stage: with_callback("Logs", stage) == usual[stage] for stage in STAGES} == dict.fromkeys(STAGES, False)
    assert {stage: with_callback("Silent", stage) == usual[stage] for stage in STAGES} == dict.fromkeys(STAGES, True)
    watching = {stage: with_callback("Watches", stage) == usual[stage] for stage in STAGES}
    assert watching == {"autoencoder": True, "diffusion": False}
    with pytest.raises(ConfigError, match=r"Misnamed\.watches is 'latent_diffusion': name a module's class"):
        with_callback("Misnamed", "autoencoder")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_callback_logs_stands_at_its_step_also_when_resumed(tmp_path, monkeypatch, accumulate):
    shards = make_data(tmp_path)[2]
    monkeypatch.setenv("LDM_ALLOW", __name__)
    asked = ["max_steps=4", "callbacks.checkpoints.every_n_steps=2", f"accumulate={accumulate}"]
    asked = config(f"shards={shards}", *asked)
    asked["callbacks"]["mine"] = {"_target_": f"{__name__}.Logs"}
    with pytest.raises(Killed):
        train_watched(asked, tmp_path / "run", monkeypatch, Spy(die_at=("batch_start", 3)))
    path = train_run(asked, lambda digest: tmp_path / "run").path
    rows = metrics(path)
    assert {step: row["mine"] for step, row in rows.items() if "mine" in row} == {s: s for s in (1, 2, 3, 4)}
    assert {step: row["whole"] for step, row in rows.items() if "whole" in row} == {4: 4}
