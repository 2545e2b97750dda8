"""How a run was set to sample is how it is sampled: in every door, where nothing else is typed."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import here
from few import composed
from few import run as trained
from PIL import Image
from tiny_training import config, make_data

from ldm import Pipeline
from ldm.checkpoints.sampler import USUAL, sampling_settings
from ldm.config.root import conf_dir
from ldm.diffusion.guidance import AdaptiveProjected, ClassifierFree
from ldm.errors import ConfigError
from ldm.tasks.work.train import settle_sampling, train
from ldm.training.run.fit import train_run

OWN = ["guidance=1.5", "num_steps=3", "guidance_rescale=0.25", "eval_images=2"]
GROUPS = ["sampler=dpmpp_2m_sde", "grid=karras", "guider=apg", "guider.norm_threshold=2.5"]
NUMBERS = {"num_steps": 3, "guidance": 1.5, "guidance_rescale": 0.25}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run with settings of its own for all there is."""
    folder = tmp_path_factory.mktemp("own")
    _, _, latents = make_data(folder)
    asked = config(f"shards={latents}", "max_steps=1", *OWN, *GROUPS)
    return train_run(asked, lambda digest: folder / "run").path


@pytest.fixture(scope="module")
def pipe(base) -> Pipeline:
    return Pipeline.load(base)


def numbers(recipe) -> dict:
    return {name: recipe[name] for name in NUMBERS}


@pytest.mark.slow
def test_a_pipeline_draws_as_its_run_was_set_to(pipe):
    request = pipe.request("a red star")
    assert (request.num_steps, request.guidance, request.guider.rescale) == (3, 1.5, 0.25)
    assert isinstance(request.guider, AdaptiveProjected) and request.guider.norm_threshold == 2.5
    assert request.solver.name == "dpmpp_multistep" and request.spacing.func.__name__ == "karras"
    typed = {"sampler": "dpmpp_2m_sde", "spacing": {"_target_": "ldm.diffusion.grids.karras", "_partial_": True}}
    typed |= {"guider": AdaptiveProjected(norm_threshold=2.5, rescale=0.25)}
    assert torch.equal(pipe.sample("a red star"), pipe.sample("a red star", num_steps=3, guidance=1.5, **typed))
    assert len(list(pipe.steps("a red star"))) == 3


@pytest.mark.slow
def test_what_is_given_wins_even_where_it_is_the_usual(pipe):
    request = pipe.request(
        "a", num_steps=30, guidance=7.5, guidance_rescale=0.0, sampler="ddim", guider=ClassifierFree()
    )
    assert (request.num_steps, request.guidance, request.guider.rescale) == (30, 7.5, 0.0)
    assert request.solver.name == "ddim" and request.spacing is None, "a grid is its sampler's"
    assert pipe.request("a", guidance_rescale=0.0).guider.rescale == 0.0
    assert pipe.request("a", sampler="own").solver.name == "dpmpp_multistep"


@pytest.mark.slow
def test_task_sample_and_its_recipe(base, tmp_path):
    ask = ["task=sample", f"checkpoint={base}", "prompt=a red star"]
    for name, typed, expected in (
        ("own", [], NUMBERS),
        ("typed", ["guidance=7.5", "num_steps=2", "guidance_rescale=0"], {"num_steps": 2, "guidance": 7.5}),
        ("again", [f"guidance={NUMBERS['guidance']}", "num_steps=3", "guidance_rescale=0.25"], NUMBERS),
    ):
        done = here(*ask, *typed, f"output={tmp_path / name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        recipe = json.loads(Image.open(tmp_path / name / "0000.png").text["ldm"])
        assert numbers(recipe) == {"guidance_rescale": 0, **expected}
        assert recipe["guider"]["_target_"].endswith("AdaptiveProjected")
        assert recipe["sampler"]["solve"]["_target_"].endswith("dpmpp_multistep")
        assert recipe["grid"]["_target_"].endswith("karras")
    own, again = (Image.open(tmp_path / name / "0000.png").tobytes() for name in ("own", "again"))
    assert own == again
    changed = here(*ask, "guider.interval=[0.5,3]", f"output={tmp_path / 'interval'}", cwd=tmp_path)
    assert changed.returncode == 0, changed.stderr
    guider = json.loads(Image.open(tmp_path / "interval" / "0000.png").text["ldm"])["guider"]
    assert guider["_target_"].endswith("AdaptiveProjected") and guider["interval"] == [0.5, 3]


@pytest.mark.slow
def test_converted_folders_keep_them(base, pipe, tmp_path):
    pipe.save(tmp_path / "saved")
    assert here("task=convert", f"checkpoint={base}", "format=ldm", "output=made", cwd=tmp_path).returncode == 0
    for folder in ("saved", "made"):
        other = Pipeline.load(tmp_path / folder).request("a")
        assert (other.num_steps, other.guidance, other.guider.rescale) == (3, 1.5, 0.25)
        assert isinstance(other.guider, AdaptiveProjected) and other.solver.name == "dpmpp_multistep"


def test_published_checkpoints_stay_as_they_are_published(sd1_folder):
    request = Pipeline.load(sd1_folder).request("a")
    assert (request.num_steps, request.guidance, request.guider.rescale) == (30, 7.5, 0.0)
    assert isinstance(request.guider, ClassifierFree)


@pytest.mark.slow
def test_the_evaluation_of_a_run_is_the_one_it_made_itself(tmp_path):
    """Whatever seed it has: task=evaluate without a key reads what the stage wrote."""
    first = ["experiment=quickstart", "debug=fast_dev_run", "logger=none", "name=run", "guidance=1.25", "seed=3"]
    assert here(*first, "outputs=made", cwd=tmp_path).returncode == 0
    run = tmp_path / "made" / "run"
    (file,) = run.glob("evaluation-*/evaluation.json")
    before, asked = file.stat().st_mtime_ns, json.loads(file.read_text())["asked"]
    assert (asked["guidance"], asked["num_steps"], asked["eval_images"]) == (1.25, 4, 4)
    done = here("task=evaluate", f"checkpoint={run}", cwd=tmp_path)
    assert done.returncode == 0 and file.stat().st_mtime_ns == before, done.stderr
    done = here("task=evaluate", f"checkpoint={run}", "guidance=7.5", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(file.read_text())["asked"]["guidance"] == 7.5
    assert yaml.safe_load((run / "config.yaml").read_text())["guidance_rescale"] == 0.0, "no null in a run"


@pytest.mark.slow
def test_a_fine_tune_adopts_them(base, tmp_path):
    settings = composed("finetune", f"checkpoint={base}", "guidance=null", "num_steps=null", "images=x")
    settle_sampling(settings)
    assert numbers(settings) == NUMBERS and settings.guider.norm_threshold == 2.5
    assert settings.sampler.solve._target_.endswith("dpmpp_multistep")
    assert composed("finetune").guidance == 1.5  # typed, in few.SHORT
    shards = base.parent / "shards"
    run = trained("finetune", base, tmp_path, f"shards={shards}", "guidance=null", "max_steps=1")
    assert numbers(yaml.safe_load((run / "config.yaml").read_text())) == {**NUMBERS, "num_steps": 2}


def test_what_an_adopted_file_says_is_text(base, monkeypatch):
    """A file's ${ is no question to this machine's environment."""
    monkeypatch.setenv("LDM_SECRET", "secret")
    theirs = {"guidance": 2.25, "sampler": {"solve": "${oc.env:LDM_SECRET}"}}
    monkeypatch.setattr("ldm.tasks.work.train.read_config", lambda folder: theirs)
    settings = composed("finetune", f"checkpoint={base}", "guidance=null", "images=x")
    settle_sampling(settings)
    assert settings.guidance == 2.25 and settings.sampler.solve == "${oc.env:LDM_SECRET}"


def test_a_fine_tune_in_debug_adopts_them(base, monkeypatch):
    seen = []
    monkeypatch.setattr("ldm.tasks.work.train._train", lambda config: seen.append(config) or {})
    settings = composed("finetune", f"checkpoint={base}", "guidance=null", "images=x", "debug=fast_dev_run")
    assert settings.adopt is None
    train(settings)
    assert seen[0].guidance == NUMBERS["guidance"] and seen[0].adopt is True


def test_usual_ones_are_what_training_writes():
    settings = composed("quickstart", "guidance=null", "num_steps=null")
    settle_sampling(settings)
    assert {k: settings[k] for k in USUAL} == USUAL
    assert settings.guider == {"_target_": "ldm.diffusion.guidance.ClassifierFree", "rescale": 0.0}


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_dir() / "guider").glob("*.yaml")))
def test_settings_settle_once(name):
    """What is resolved stays as it is, whatever run it is asked of."""
    node = yaml.safe_load((conf_dir() / "guider" / f"{name}.yaml").read_text())
    once = sampling_settings({"guider": node, "guidance": 2.0, "guidance_rescale": 0.5}, {})
    assert sampling_settings(once, {"guidance": 9.0, "guider": {"_target_": "x"}, "eta": 1.0, "num_steps": 5}) == {
        **once,
        "eta": 1.0,  # the sampler is still open
    }


NO_NUMBERS = ["many", True, float("nan"), float("inf"), [1.5], {}]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -3, 10**9, 2.5])
def test_settings_that_cannot_be_are_refused(value):
    """A config.yaml is somebody's file."""
    for name in ("num_steps", *(("guidance", "guidance_rescale", "eta") if value in NO_NUMBERS else ())):
        with pytest.raises(ConfigError, match=rf"{name}=.*give {name}= here"):
            sampling_settings({}, {name: value})
    with pytest.raises(ConfigError, match="give guider= here"):
        sampling_settings({}, {"guider": "apg"})
    assert sampling_settings({"num_steps": 4, "sampler": "ddim"}, {"num_steps": value})["num_steps"] == 4


def test_a_second_model_that_is_gone_is_never_fetched():
    weak = {"guider": {"_target_": "ldm.diffusion.guidance.Autoguidance", "checkpoint": "somebody/model"}}
    with pytest.raises(ConfigError, match=r"somebody/model, which is not there: give guider=autoguidance"):
        sampling_settings({}, weak)
    assert sampling_settings({"guider": {"_target_": "x"}}, weak)["guider"]["_target_"] == "x"
