"""What the offline file of W&B says of a run, read record by record: who it is, where it belongs, its scores."""

import json
import struct
from pathlib import Path

import pytest
import yaml
from commands import wait_for
from wandb.proto import wandb_internal_pb2

from ldm.training.run.directory import RunDirectory
from ldm.training.run.wandb_mirror import WandbMirror, add_scores

BLOCK = 32768  # of LevelDB's log: crc (4), length (2), type (1: whole, 2: first, 3: middle, 4: last), data
MODULES = {
    "latent_diffusion": {"_target_": "ldm.training.latent_diffusion.LatentDiffusion"},
    "autoencoder": {"_target_": "ldm.training.autoencoder.AutoencoderTraining"},
}
CONFIG = {"name": None, "experiment": "law", "module": MODULES["latent_diffusion"], "batch_size": 4, "accumulate": 2}


def records(file: Path):
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def said(run: Path):
    """(run record, its configuration, summary) of the newest offline folder of a run."""
    (file,) = max((run / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime_ns).glob("*.wandb")
    wait_for(lambda: any(r.WhichOneof("record_type") == "exit" for r in records(file)), 20)  # W&B writes on its own
    found, summary, config, defined = None, {}, {}, []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found = record.run
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "config":
            config |= {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "summary":
            summary |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "metric":
            defined.append(record.metric.name or record.metric.glob_name)
    return found, config, summary, defined


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "TAGS", "NOTES", "NAME", "JOB_TYPE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("LDM_COMMAND", "python -m ldm.run experiment=law")


def logged(path: Path, identity="x", config=CONFIG, **logger):
    directory = RunDirectory(path, {**config, "logger": _node(logger)}, {"identity": identity, "global_batch": 16})
    directory.open()
    directory.close()
    mirror = WandbMirror(path, config, images_per_step=16, **logger)
    mirror.log_metrics({"train/loss": 0.5}, 3)
    mirror.finalize("success")
    assert not mirror.failed
    return said(path)


def _node(logger):
    return {"_target_": "ldm.training.run.wandb_mirror.WandbMirror", "_partial_": True, **logger}


@pytest.mark.slow
def test_who_a_run_is_and_where_it_belongs(tmp_path, monkeypatch):
    run, config, summary, defined = logged(tmp_path / "a/run", tags=["x", "y"], notes="why")
    about = json.loads((tmp_path / "a/run/run.json").read_text())
    assert run.run_id == f"{about['digest']}-{about['nonce']}" and run.display_name == "run"
    assert (run.project, run.job_type, list(run.tags), run.notes) == ("ldm", "diffusion", ["x", "y"], "why")
    facts = config["run"]
    assert (facts["global_batch"], facts["world_size"]) == (16, 2)
    assert facts["git_commit"] == about["git_commit"] and facts["versions"]["torch"]
    assert summary["train/loss"] == 0.5 and summary["images"] == 48 and "images" in defined
    # Another machine with the same path and command has another id; the other stage of the command the same group.
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "p,q")
    other, *_ = logged(tmp_path / "b/run", config={**CONFIG, "module": MODULES["autoencoder"]})
    assert other.run_id != run.run_id and other.run_group == run.run_group and other.run_group.startswith("law-")
    assert (other.job_type, other.project, list(other.tags)) == ("autoencoder", "theirs", ["p", "q"])
    # The same run, resumed after whatever ended it, keeps its id; a group that is given is taken.
    again, *_ = logged(tmp_path / "a/run", group="mine", project="ours")
    assert again.run_id == run.run_id and again.run_group == "mine" and again.project == "ours"
    monkeypatch.setenv("WANDB_RUN_GROUP", "by-variable")
    named, *_ = logged(tmp_path / "c", config={**CONFIG, "name": "c"})
    assert named.run_group == "by-variable"


@pytest.mark.slow
def test_scores_go_to_the_same_run(tmp_path):
    run, *_ = logged(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 3, "images": 48, "time": 1.0, "val/loss": 0.25}\n')
    add_scores(tmp_path / "run", {"evaluation/seen/all": 0.875})
    again, _, summary, _ = said(tmp_path / "run")
    assert again.run_id == run.run_id and len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 2
    assert summary["evaluation/seen/all"] == 0.875 and summary["val/loss"] == 0.25
    (tmp_path / "none").mkdir()
    add_scores(tmp_path / "none", {"evaluation/seen/all": 0.875})  # a run without W&B, or no run at all
    assert not list((tmp_path / "none").iterdir())


def test_the_options_have_every_key():
    import inspect

    for name in ("offline", "wandb"):
        node = yaml.safe_load((Path(__file__).parents[2] / f"conf/logger/{name}.yaml").read_text())
        given = set(inspect.signature(WandbMirror).parameters) - {"directory", "config", "images_per_step"}
        assert {k for k in node if not k.startswith("_")} == given
