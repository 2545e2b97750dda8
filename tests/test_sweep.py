"""A sweep: every arm that has a meaning runs, the others are refused in a row of the table, and it ends with 0."""

import csv

import pytest
from commands import ldm

from ldm.tasks.arms import record


def test_rows_are_replaced_by_a_repeated_arm(tmp_path):
    record(tmp_path, ["experiment=x", "seed=1"], "a", "refused", {}, "a reason, with a comma")
    record(tmp_path, ["experiment=x", "seed=2"], "b", "finished", {"val/loss": 0.5}, "")
    record(tmp_path, ["experiment=x", "seed=1"], "a", "finished", {"val/loss": 0.25}, "")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(r["seed"], r["state"], r["val/loss"]) for r in rows] == [
        ("1", "finished", "0.25"),
        ("2", "finished", "0.5"),
    ]


@pytest.mark.slow
def test_a_sweep_ends_with_one_table(tmp_path):
    command = ["-m", "experiment=quickstart", "debug=fast_dev_run", "logger=none", "name=axes"]
    result = ldm(*command, "scheduler=cosine,flow", "parameterization=eps,v", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "outputs/axes/results.csv").open()))
    states = {(r["scheduler"], r["parameterization"]): r["state"] for r in rows}
    assert states == {
        ("cosine", "eps"): "finished",
        ("cosine", "v"): "finished",
        ("flow", "eps"): "refused",
        ("flow", "v"): "finished",
    }
    assert all(float(r["val/loss"]) > 0 for r in rows if r["state"] == "finished")
    refused = next(r for r in rows if r["state"] == "refused")
    assert "parameterization=v" in refused["message"]
    assert "refused: " in result.stderr and "Traceback" not in result.stderr
    # The arms share their shards, autoencoder and latents.
    assert len(list((tmp_path / "outputs/stages").glob("autoencoder-*"))) == 1
    assert len(list((tmp_path / "outputs/axes").glob("*/config.yaml"))) == 3
    # The same sweep finds its arms finished.
    again = ldm(*command, "scheduler=cosine,flow", "parameterization=eps,v", cwd=tmp_path)
    assert again.returncode == 0 and "was finished before" in again.stdout


@pytest.mark.slow
def test_self_launched_ddp_sweeps_are_refused(tmp_path):
    result = ldm("-m", "experiment=quickstart", "trainer=ddp", "seed=1,2", cwd=tmp_path)
    assert result.returncode == 2 and "torchrun" in result.stderr
