"""Several processes without torchrun: the command starts them, passes signals on, ends as they do, leaves none."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, children, here, lives, metrics, start, wait_for
from omegaconf import OmegaConf
from ranks import command, on_ranks
from tiny_training import TINY

import ldm.tasks.work.train as training
from ldm.checkpoints.folder import all_folders
from ldm.config.root import plain
from ldm.errors import ConfigError
from ldm.tasks.work.stages import Stages
from ldm.training.distributed.launcher import Launcher
from ldm.training.distributed.strategy import local_processes

BASE = [t for t in TINY if not t.startswith("trainer")] + ["trainer.accelerator=cpu", "trainer.devices=2"]
BASE += ["callbacks.samples=null", "callbacks.jump_to_x0=null", "lr_scheduler=constant"]


def step(run: Path) -> int:
    return json.loads((run / "status.json").read_text())["step"] if (run / "status.json").is_file() else 0


@pytest.mark.slow
def test_two_are_one_that_accumulates_two_and_a_killed_one_is_started_again(latents, tmp_path):
    """And the run is the one that a single process has: another command of it finds it finished."""
    typed = [*BASE, f"shards={latents}", "max_steps=8", "callbacks.checkpoints.every_n_steps=1", "name=two"]
    typed += ["launcher.max_restarts=1", f"+callbacks.slow={{_target_: slow.Slow, seconds: 0.3, folder: {tmp_path}}}"]
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "LDM_ALLOW": "slow"}
    asked = [sys.executable, "-m", "ldm.run", *typed]
    process = subprocess.Popen(asked, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: step(tmp_path / "outputs/two") >= 3)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    (tmp_path / "quick").touch()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "restart 1 of 1: rank 1 was killed by SIGKILL" in said
    events = [json.loads(line) for line in (tmp_path / "outputs/two/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events][-2:] == ["resume", "finish"] and events[-2]["step"] >= 2
    one = [t for t in BASE if "devices" not in t] + [f"shards={latents}", "max_steps=8", "accumulate=2", "name=one"]
    assert here(*one, "callbacks.checkpoints.every_n_steps=1", cwd=tmp_path).returncode == 0
    first, second = metrics(tmp_path / "outputs/one"), metrics(tmp_path / "outputs/two")
    assert first.keys() == second.keys()
    for number, values in first.items():
        assert values == pytest.approx(second[number], rel=1e-6, abs=1e-9), number
    digests = [json.loads((tmp_path / f"outputs/{n}/run.json").read_text())["digest"] for n in ("one", "two")]
    assert digests[0] == digests[1]
    again = here(*one[:-1], "name=two", cwd=tmp_path)
    assert again.returncode == 0 and "was finished before" in again.stdout


SLOW = """
import time
from pathlib import Path
import lightning as L


class Slow(L.Callback):
    decides = False

    def __init__(self, seconds: float, folder: str, fails_at: int = -1):
        self.seconds, self.folder, self.fails_at = seconds, Path(folder), fails_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.fails_at and trainer.global_rank == 1:
            raise RuntimeError("this rank has had enough")
        if not (self.folder / "quick").exists():
            time.sleep(self.seconds)
"""


@pytest.mark.slow
def test_signals_reach_all_and_nobody_is_left(latents, tmp_path):
    typed = [*BASE, f"shards={latents}", "max_steps=100000", "callbacks.checkpoints.every_n_steps=5", "name=x"]
    typed += ["callbacks.validation=null"]
    run = tmp_path / "outputs/x"

    def started(steps: int):
        process = start(*typed, cwd=tmp_path)
        wait_for(lambda: step(run) >= steps)
        return process, children(process.pid)

    process, pids = started(10)
    assert len(pids) == 2 and all(map(lives, pids))
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and said.count("stopped by SIGTERM after step") == 1, said
    assert not any(map(lives, pids))
    before = int(all_folders(run)[-1].name.split("-")[1])
    assert before == step(run)
    process, pids = started(before + 5)  # the same command goes on
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(lives, pids)), seconds=15)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"  # they have saved: SIGTERM came to them
    assert step(run) > before


@pytest.mark.slow
def test_arms_of_a_sweep_have_their_values_and_who_fails_is_named(latents, tmp_path, monkeypatch):
    """The failure of one process is the arm's, in its own words; the sweep's processes compose nothing themselves."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "quick").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LDM_ALLOW", "slow")
    monkeypatch.syspath_prepend(tmp_path)
    slow = f"+callbacks.slow={{_target_: slow.Slow, seconds: 0, folder: {tmp_path}}}"
    typed = [*BASE, f"shards={latents}", "max_steps=2", "optimized_metric=train/loss", "callbacks.validation=null"]
    done = here("-m", *typed, slow, "+callbacks.slow.fails_at=-1,1", cwd=tmp_path)
    rows = list(csv.DictReader(next((tmp_path / "outputs").glob("*/results.csv")).open()))
    assert [r["state"] for r in rows] == ["finished", "failed"], done.stderr
    assert float(rows[0]["train/loss"]) > 0 and done.returncode == 3
    assert "RuntimeError: this rank has had enough" in rows[1]["message"]
    assert all((tmp_path / r["directory"] / "run.json").is_file() for r in rows)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["trainer.num_nodes=2"], "torchrun --nnodes=HOSTS"),
        (["launcher.max_restarts=-1"], "at least 0"),
        (["launcher.max_restart=1"], "Did you mean"),
        (["optimizer.lr=fast"], "optimizer.lr"),
    ],
)
def test_a_refusal_starts_nothing(monkeypatch, tmp_path, typed, said):
    monkeypatch.setattr(subprocess, "Popen", None)
    done = here(*BASE, "shards=nowhere", *typed, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_the_processes_read_is_the_command_s(monkeypatch, tmp_path):
    """Stage by stage: a stage's own steps reach the trainer by reference, and free text stays text."""
    told = {}
    monkeypatch.setattr(Launcher, "run", lambda self, job, *_: told.update(json.loads(json.dumps(job, default=str))))
    monkeypatch.setattr(training, "check", lambda config: told.update(ours=config))
    typed = ["experiment=quickstart", "trainer.devices=2", "stages.autoencoder.max_steps=7", "name=50 % of ${x}"]
    assert here(*typed, cwd=tmp_path).returncode == 0
    theirs = OmegaConf.create(told["config"])
    for stage in ("autoencoder", None):
        ours, read = (Stages(c).configured(stage) if stage else c for c in (told["ours"], theirs))
        assert plain(ours) == plain(read)
    assert Stages(theirs).configured("autoencoder").trainer.max_steps == 7


def test_torchrun_starts_its_own_again(tmp_path):
    typed = [t for t in BASE if "devices" not in t] + ["shards=nowhere", "launcher.max_restarts=2"]
    for rank in on_ranks(command(*typed, cwd=tmp_path)):
        assert rank.code == 2
    assert "torchrun started these processes" in on_ranks(command(*typed, cwd=tmp_path))[0].err


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [(1, (1, [])), (4, (4, [])), ("3", (3, [])), ([0, 2], (2, [0, 2])), ("[1,3]", (2, [1, 3])), ("0,", (1, [0]))],
)
def test_devices_as_lightning_reads_them(devices, wanted):
    assert local_processes({"devices": devices}) == wanted


def test_all_gpus_are_those_that_are_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert local_processes({"devices": "auto"}) == (8, []) == local_processes({"devices": -1})
    assert local_processes({"devices": "auto", "accelerator": "cpu"}) == (1, [])


def test_a_number_of_restarts_that_cannot_be():
    with pytest.raises(ConfigError, match="max_restarts=-1"):
        Launcher(-1)
