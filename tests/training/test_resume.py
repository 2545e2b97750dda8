"""A run that was killed and started again is the run that was not: losses, weights, averages, batches, bit for bit."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from commands import metrics, start, wait_for
from safetensors.torch import load_file
from tiny_training import Killed, Spy, config, fingerprint, make_data, train_watched

from ldm.checkpoints.folder import all_folders, verify
from ldm.checkpoints.state import FILE as STATE
from ldm.checkpoints.state import joined
from ldm.training.callbacks.saving import Interrupted
from ldm.training.run import checkpoint_io
from ldm.training.run.checkpoint_io import FolderCheckpointIO
from ldm.training.run.directory import RunDirectory

STEPS = ["max_steps=12", "callbacks.checkpoints.every_n_steps=3", "callbacks.checkpoints.keep_last=2"]
STEPS += [
    "callbacks.validation.every_n_steps=3",
    "callbacks.jump_to_x0.every_n_steps=6",
    "callbacks.samples.every_n_steps=6",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run(directory, data, monkeypatch, spy, *overrides):
    """train_run with a spy among the callbacks, before the checkpoint callback."""
    return train_watched(config(f"shards={data[2]}", *STEPS, *overrides), directory, monkeypatch, spy)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    directory, spy = tmp_path_factory.mktemp("whole") / "run", Spy()
    with pytest.MonkeyPatch.context() as patch:
        run(directory, data, patch, spy)
    return directory, spy


@pytest.mark.parametrize(
    "point",
    [
        ("backward", 7),
        *(pytest.param(p, marks=pytest.mark.slow) for p in [("batch_start", 4), ("batch_end", 9), ("batch_end", 12)]),
    ],
)
def test_killed_and_started_again_is_the_same_run(point, data, uninterrupted, tmp_path, monkeypatch):
    whole, whole_spy = uninterrupted
    with pytest.raises(Killed):
        run(tmp_path / "run", data, monkeypatch, Spy(die_at=point))
    again = Spy()
    run(tmp_path / "run", data, monkeypatch, again)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert fingerprint(all_folders(tmp_path / "run")[-1]) == fingerprint(all_folders(whole)[-1])
    expected = dict(whole_spy.keys)
    assert again.keys and all(expected[step] == keys for step, keys in again.keys)
    pictures = sorted(p.name for p in (tmp_path / "run/images").glob("*.png"))
    assert pictures == sorted(p.name for p in (whole / "images").glob("*.png"))


@pytest.mark.slow
def test_muon_resumes_exactly_too(data, tmp_path, monkeypatch):
    muon = ["optimizer=muon", "max_steps=6"]
    run(tmp_path / "whole", data, monkeypatch, Spy(), *muon)
    with pytest.raises(Killed):
        run(tmp_path / "run", data, monkeypatch, Spy(die_at=("backward", 4)), *muon)
    run(tmp_path / "run", data, monkeypatch, Spy(), *muon)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    ends = [fingerprint(all_folders(tmp_path / name)[-1]) for name in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_larger_max_steps_continues_and_finished_is_left_alone(data, tmp_path, monkeypatch):
    constant = ["lr_scheduler=constant"]
    run(tmp_path / "run", data, monkeypatch, Spy(), "max_steps=4", *constant)
    spy = Spy()
    assert run(tmp_path / "run", data, monkeypatch, spy, "max_steps=4", *constant).trained is False and not spy.keys
    run(tmp_path / "run", data, monkeypatch, spy, "max_steps=6", *constant)
    assert [step for step, _ in spy.keys] == [4, 5]
    run(tmp_path / "straight", data, monkeypatch, Spy(), "max_steps=6", *constant)
    ends = [fingerprint(all_folders(tmp_path / name)[-1]) for name in ("run", "straight")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_passed_over(data, uninterrupted, tmp_path, monkeypatch, capsys):
    whole, _ = uninterrupted
    with pytest.raises(Killed):
        run(tmp_path / "run", data, monkeypatch, Spy(die_at=("batch_start", 10)))
    newest = all_folders(tmp_path / "run")[-1] / "unet.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    run(tmp_path / "run", data, monkeypatch, Spy())
    assert "passed over" in capsys.readouterr().out
    assert fingerprint(all_folders(tmp_path / "run")[-1]) == fingerprint(all_folders(whole)[-1])


@pytest.mark.slow
def test_sigterm_saves_at_the_step_boundary_and_goes_on(data, uninterrupted, tmp_path, monkeypatch):
    whole, _ = uninterrupted

    class Terminator(Spy):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 7 and not all_folders(tmp_path / "stopped"):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "run", data, monkeypatch, Terminator())
    assert stopped.value.exit_code == 75 and stopped.value.step == 8
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "stopped/checkpoints")
    run(tmp_path / "run", data, monkeypatch, Terminator())
    assert metrics(tmp_path / "run") == metrics(whole)


@pytest.mark.slow
def test_out_of_hours_it_saves_and_the_same_command_goes_on(data, uninterrupted, tmp_path, monkeypatch):
    clock = iter([0.0] * 4 + [3601.0] * 100)
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match="stopped by max_hours after step 5") as stopped,
    ):
        patch.setattr("ldm.training.callbacks.saving.STARTED", 0.0)
        patch.setattr("ldm.training.callbacks.saving.time.monotonic", lambda: next(clock))
        run(tmp_path / "run", data, patch, Spy(), "max_hours=1")
    assert stopped.value.exit_code == 75 and all_folders(tmp_path / "run")[-1].name == "step-00000005"
    run(tmp_path / "run", data, monkeypatch, Spy(), "max_hours=1000")
    assert metrics(tmp_path / "run") == metrics(uninterrupted[0])


@pytest.mark.slow
def test_real_kill_of_the_whole_command(tmp_path, data):
    """kill -9 of `python -m ldm.run`, three times, then to the end: as one run that was left alone."""
    base = ["model=unet_tiny", "text_encoder=small_tiny", "autoencoder=kl_tiny", "trainer=debug", "batch_size=2"]
    base += ["logger=none", f"shards={data[2]}", "max_steps=40", "callbacks.losses.every_n_steps=1"]
    base += [
        "callbacks.checkpoints.every_n_steps=5",
        "callbacks.validation.every_n_steps=10",
        "data.validation_samples=4",
    ]
    base += ["callbacks.jump_to_x0.num_steps=2", "callbacks.samples.num_steps=2", "callbacks.samples.every_n_steps=20"]
    left_alone = start(*base, "name=whole", cwd=tmp_path)
    killed = tmp_path / "outputs/killed"
    for lines in (6, 17, 29):
        process = start(*base, "name=killed", cwd=tmp_path)
        file = killed / "metrics.jsonl"
        wait_for(lambda f=file, n=lines: f.is_file() and len(f.read_text().splitlines()) >= n)
        process.kill()
        process.communicate()
    process = start(*base, "name=killed", cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    output, _ = left_alone.communicate(timeout=120)
    assert left_alone.returncode == 0, output
    whole = tmp_path / "outputs/whole"
    assert metrics(killed) == metrics(whole)
    assert fingerprint(all_folders(killed)[-1]) == fingerprint(all_folders(whole)[-1])


@pytest.mark.slow
def test_ctrl_c_of_the_command_leaves_130_and_a_loadable_run(tmp_path, data):
    base = ["model=unet_tiny", "text_encoder=small_tiny", "autoencoder=kl_tiny", "trainer=debug", "batch_size=2"]
    process = start(*base, f"shards={data[2]}", "max_steps=100000", "name=stopped", "logger=none", cwd=tmp_path)
    file = tmp_path / "outputs/stopped/metrics.jsonl"
    wait_for(lambda: file.is_file() and file.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 130, output
    assert "The same command goes on from there" in output and "Traceback" not in output
    assert len(all_folders(tmp_path / "outputs/stopped")) == 1


@pytest.mark.slow
def test_a_disk_that_is_full_is_what_is_told(data, tmp_path, monkeypatch):
    """Also where there is no room to write down that the run stopped."""
    before = RunDirectory.set_status

    def write(self, path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    def status(self, state, *args, **kwargs):
        if state == "stopped":
            raise OSError(errno.EIO, "another")
        before(self, state, *args, **kwargs)

    monkeypatch.setattr(FolderCheckpointIO, "save_checkpoint", write)
    monkeypatch.setattr(RunDirectory, "set_status", status)
    with pytest.raises(OSError, match="full"):
        run(tmp_path / "run", data, monkeypatch, Spy(), "max_steps=1")


@pytest.fixture
def slow_disk(monkeypatch):
    """Checkpoints take many steps to write; the names of the threads that wrote them."""
    original, seen = checkpoint_io.write, []

    def slow(folder, *args):
        seen.append(threading.current_thread().name)
        time.sleep(0.5)
        original(folder, *args)

    monkeypatch.setattr(checkpoint_io, "write", slow)
    return seen


def test_a_checkpoint_written_in_the_background_is_of_its_step(data, uninterrupted, slow_disk, tmp_path, monkeypatch):
    """Training is many steps on when it is written; all of them stay, whole, with the numbers of their steps."""
    keep = ["callbacks.checkpoints.keep_last=null", "callbacks.validation=null", "callbacks.samples=null"]
    keep += ["callbacks.jump_to_x0=null"]
    for name, where in (("there", "true"), ("here", "false")):
        run(tmp_path / name, data, monkeypatch, Spy(), *keep, f"callbacks.checkpoints.in_background={where}")
    assert [name.startswith("checkpoint") for name in slow_disk] == [True] * 4 + [False] * 4
    there, here = (all_folders(tmp_path / name) for name in ("there", "here"))
    assert [f.name for f in there] == [f.name for f in here] and len(there) == 4
    assert [fingerprint(f) for f in there] == [fingerprint(f) for f in here]
    assert all(verify(f) is None for f in there)


@pytest.mark.slow
def test_what_fails_in_the_background_ends_the_run_and_leaves_what_is_good(data, tmp_path, monkeypatch):
    """No step after the next, no older checkpoint removed for one that is not there; then it goes on."""
    original, steps = checkpoint_io.write, []

    def full(folder, *args):
        if folder.name == "step-00000006":
            folder.with_name(folder.name + ".part").mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, *args)

    class Count(Spy):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(trainer.global_step)
            time.sleep(0.2)  # the thread is that quick

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "run", data, monkeypatch, Count(), "callbacks.checkpoints.keep_last=1")
    assert steps[-1] <= 7
    assert [f.name for f in all_folders(tmp_path / "run")] == ["step-00000003"]
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "stopped"
    again = Spy()
    run(tmp_path / "run", data, monkeypatch, again, "callbacks.checkpoints.keep_last=1")
    assert again.keys[0][0] == 3 and [f.name for f in all_folders(tmp_path / "run")] == ["step-00000012"]
    assert not list((tmp_path / "run/checkpoints").glob("*.part"))


@pytest.mark.slow
def test_an_optimizer_in_state_pt_goes_on(data, uninterrupted, tmp_path, monkeypatch):
    """As it stood there before its tensors had a file of their own."""
    with pytest.raises(Killed):
        run(tmp_path / "run", data, monkeypatch, Spy(die_at=("batch_start", 6)))
    folder = all_folders(tmp_path / "run")[-1]
    state = joined(torch.load(folder / "state.pt", weights_only=True), load_file(folder / STATE))
    shutil.rmtree(folder / "state")
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][STATE]
    manifest["files"]["state.pt"] = {
        "bytes": (folder / "state.pt").stat().st_size,
        "sha256": hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run(tmp_path / "run", data, monkeypatch, Spy())
    whole = all_folders(uninterrupted[0])[-1]
    assert fingerprint(all_folders(tmp_path / "run")[-1]) == fingerprint(whole)
