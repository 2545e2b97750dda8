"""debug=... goes with the lines that README and docs/tasks.md teach: one's own pictures, and a model to start from."""

import json
from pathlib import Path

import pytest
from commands import here
from conf_nodes import CONF, EXPERIMENTS, composed
from few import make_pictures

from ldm.build import build
from ldm.config.check import check
from ldm.data.sources.folder import FolderSource
from ldm.data.sources.shapes import ShapesSource

DEBUGS = sorted(p.stem for p in (CONF / "debug").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("debug", DEBUGS)
def test_every_experiment_takes_ones_own_pictures(experiment, debug):
    config = composed(f"experiment={experiment}", f"debug={debug}", "source=folder", "images=pics")
    check(config)
    assert isinstance(build(config.source, "source"), FolderSource)


def test_a_tiny_run_draws_shapes_where_no_pictures_are_given():
    source = build(composed("experiment=finetune", "debug=fast_dev_run").source, "source")
    assert isinstance(source, ShapesSource) and source.counts["train"] == 64
    chosen = ("source.validation_fraction=0.5", "source.captions=c.csv", "images=pics")
    ours = build(composed("experiment=finetune", "debug=fast_dev_run", *chosen).source, "source")
    theirs = build(composed("source=folder", *chosen).source, "source")
    assert vars(ours) == vars(theirs)


def test_pictures_that_nothing_would_read_are_refused(tmp_path):
    for typed in (("experiment=quickstart",), ("task=prepare", "source=emoji")):
        done = here(*typed, "images=pics", cwd=tmp_path)
        assert done.returncode == 2 and "images=pics is not read by" in done.stderr and "source=folder" in done.stderr
        assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.tar"))


@pytest.mark.slow
def test_own_pictures_and_then_a_model_of_ones_own(tmp_path: Path):
    make_pictures(tmp_path / "pics", 6)
    for i in range(6):
        (tmp_path / f"pics/{i}.txt").write_text(f"picture {i}")
    tiny = ("images=pics", "debug=fast_dev_run", "logger=none")
    done = here("experiment=quickstart", "source=folder", *tiny, "name=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "outputs/mine/stages.json").read_text())
    assert stages["prepare"]["samples"] == {"train": 6} and stages["autoencoder"]["step"] == 3
    for line in (
        ("experiment=finetune",),
        ("experiment=inpaint",),
        ("experiment=dreambooth", "instance_prompt=a sks dog", "class_prompt=a dog"),
        ("experiment=finetune", "adapter=[lora]"),
        ("experiment=quickstart", "source=folder"),
    ):
        done = here(*line, *tiny, "checkpoint=outputs/mine", "name=more", "outputs=more", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "--- autoencoder" not in done.stdout, "it has one"
        assert json.loads((tmp_path / "more/more/status.json").read_text())["step"] == 3
        (tmp_path / "more/more").rename(tmp_path / f"more/{'-'.join(line)[:40]}".replace(" ", ""))


@pytest.mark.slow
def test_overfit_on_ones_own_pictures(tmp_path: Path):
    make_pictures(tmp_path / "pics", 4)
    typed = ["experiment=quickstart", "source=folder", "images=pics", "name=mine", "debug=overfit", "logger=none"]
    typed += ["stages.autoencoder.max_steps=2", "max_steps=2", "eval_images=2"]
    done = here(*typed, "instance_prompt=a thing", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
