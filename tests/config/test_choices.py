"""A group that is chosen to be nothing is nothing, whatever an experiment has set inside it."""

import shutil

import pytest
import yaml
from commands import here
from conf_nodes import CONF, options

import ldm.tasks.work.train as training
from ldm.config.check import check
from ldm.config.choices import EMPTY, FREE, LISTS, MANY, NO_NODES, NOTHING, said_in_words
from ldm.config.root import conf_dir, plain
from ldm.config.schema import group_names

EXPERIMENTS = options("experiment")
CAN_BE_EMPTY = [g for g in group_names() if g != "task" and set(EMPTY) & set(options(g))]


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """What task=train is handed for a command line, checked as it checks it."""
    found = {}

    def keep(config):
        training.settle_sampling(config)
        check(config)
        found["config"] = plain(config)
        return {}

    monkeypatch.setattr(training, "train", keep)

    def typed(*arguments: str):
        found.clear()
        done = here(*arguments, cwd=tmp_path)
        return found["config"] if done.returncode == 0 else done.stderr

    return typed


def empty(group: str) -> dict:
    option = next(o for o in EMPTY if o in options(group))
    return yaml.safe_load((CONF / group / f"{option}.yaml").read_text())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_nothing_beside_every_experiment(chosen, experiment):
    groups = [g for g in CAN_BE_EMPTY if g not in (*NO_NODES, "guider")]
    config = chosen(
        f"experiment={experiment}", *(f"{g}=null" for g in groups), "adapter=[]", "model.cross_attention_dim=8"
    )
    assert isinstance(config, dict), config
    for group in groups:
        assert config[group] == empty(group), group
    assert not config["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("group", [g for g in CAN_BE_EMPTY if g not in NO_NODES])
@pytest.mark.parametrize("word", ["null", "none", "[]"])
def test_nothing_beside_keys_that_an_experiment_sets(chosen, tmp_path, group, word):
    """The law for experiments that are still to be written: keys of any depth in any group that can be left out."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "theirs.yaml").write_text(
        "# @package _global_\n"
        + yaml.safe_dump({group: {"own_key": 1, "deep": {"er": [1]}}, "stages": {"diffusion": {group: {"other": 2}}}})
    )
    add = f"--config-dir={tmp_path / 'conf'}"
    config = chosen(add, "experiment=theirs", f"{group}={word}")
    assert isinstance(config, dict), config
    left = {k: v for k, v in config[group].items() if v is not None}
    assert left == {k: v for k, v in empty(group).items() if v is not None} or group == "guider"
    assert "own_key" not in config[group] and "deep" not in config[group]
    refused = chosen(add, "experiment=theirs", f"{group}={word}", f"{group}.own_key=2")
    assert isinstance(refused, str) and refused.count("\n") == 1 and f"{group}.own_key=2: nothing is chosen" in refused


@pytest.mark.parametrize("group", MANY)
def test_entries_that_nothing_was_chosen_for(chosen, tmp_path, group):
    """callbacks=mine beside an experiment that sets one that mine has not; metric=none; adapter=[]."""
    conf = tmp_path / "conf"
    for name in ("experiment", group):
        (conf / name).mkdir(parents=True)
    (conf / "experiment" / "theirs.yaml").write_text(
        f"# @package _global_\n{group}: {{absent: {{every_n_steps: 3}}}}\n"
    )
    (conf / group / "mine.yaml").write_text("there: {_target_: ldm.training.callbacks.losses.Losses}\n")
    mine = f"{group}=[mine]" if group == "adapter" else f"{group}=mine"
    config = chosen(f"--config-dir={conf}", "experiment=theirs", mine)
    assert isinstance(config, dict), config
    assert config[group] == {"there": {"_target_": "ldm.training.callbacks.losses.Losses"}}


def test_what_must_be_something_is_refused_in_one_line(chosen):
    for group in group_names():
        if group in (*CAN_BE_EMPTY, "task", "sweep", *LISTS, *FREE):  # a sweep= of one run has a line of its own
            continue
        for word in ("null", "none", "[]"):
            refused = chosen("experiment=quickstart", f"{group}={word}")
            assert isinstance(refused, str) and refused.count("\n") == 1
            assert f"{group}={word}: it cannot be left out" in refused and options(group)[0] in refused


def test_every_group_has_a_rule():
    assert {g for g in group_names() if (conf_dir() / g).is_dir()} == set(group_names())
    for group in (*FREE, *LISTS):
        assert [said_in_words(f"{group}={word}") for word in NOTHING] == [f"{group}=[]"] * 3
    assert said_in_words("ema=null,decay") == "ema=none,decay" and said_in_words("prompt=none") == "prompt=none"


def test_what_is_chosen_is_left_alone(chosen):
    config = chosen("experiment=quickstart", "ema.decay=0.5", "callbacks.samples=null", "guider.interval=[0.5,3]")
    assert (
        config["ema"] == {"_target_": "ldm.training.ema.EMA", "decay": 0.5} and config["callbacks"]["samples"] is None
    )
    assert config["guider"]["interval"] == [0.5, 3]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["none", "null"])
def test_a_run_without_averages(word, tmp_path):
    done = here("experiment=quickstart", "debug=fast_dev_run", f"ema={word}", "logger=none", "name=x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "outputs" / "x" / "checkpoints" / "step-00000003"
    assert (checkpoint / "unet.safetensors").is_file() and not list(checkpoint.glob("*.ema.*"))
    shutil.rmtree(tmp_path / "outputs")


def test_the_plan_counts_no_average(tmp_path):
    done = here("task=plan", "experiment=quickstart", "image_size=32", "ema=none", "output=plan.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    none = "memory of one process,average,0,bytes"
    assert none in (tmp_path / "plan.csv").read_text()
    with_average = here("task=plan", "experiment=quickstart", "image_size=32", "output=plan.csv", cwd=tmp_path)
    assert with_average.returncode == 0 and none not in (tmp_path / "plan.csv").read_text()


def test_terms_that_are_not_chosen_take_what_an_experiment_says_of_them_along(chosen):
    """`loss=[]` on an experiment that sets its terms' options; typed ones are refused."""
    for typed, left in (("loss=[]", set()), ("loss=[wavelet]", {"wavelet"}), ("loss=[adversarial]", {"adversarial"})):
        config = chosen("experiment=ae_small", typed)
        assert isinstance(config, dict), config
        assert set(config["module"]["losses"]) == {"reconstruction"} | left
    refused = chosen("experiment=ae_small", "loss=[]", "module.losses.adversarial.weight=1")
    assert isinstance(refused, str) and "nothing is chosen for loss=" in refused
