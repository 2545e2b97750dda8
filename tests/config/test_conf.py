"""Every YAML binds to its target's signature, every experiment composes, and what cannot be is refused in one line."""

import copy

import pytest
import yaml
from conf_nodes import CONF, EXPERIMENTS, composed
from omegaconf import OmegaConf

from ldm.build import build, check_targets
from ldm.config.check import check, check_node, fits
from ldm.config.schema import schema
from ldm.errors import ConfigError
from ldm.run import quoted

GROUPS = sorted(
    p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("experiment", "debug", "hydra", "local")
)
DEBUGS = sorted(p.stem for p in (CONF / "debug").glob("*.yaml"))


@pytest.fixture(scope="module")
def usual():
    return composed("shards=x", "images=x")


def with_option(usual, group, path):
    """What choosing an option composes; in a tenth of the time where it is nothing but a node in its place."""
    text = path.read_text()
    if "defaults:" in text or "@package" in text:
        return composed(f"{group}={path.stem}", "shards=x", "images=x")
    config = copy.deepcopy(usual)
    OmegaConf.set_struct(config, False)
    config[group] = OmegaConf.load(path)
    return config


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_binds_to_its_signature(group, usual):
    for path in sorted((CONF / group).glob("*.yaml")):
        config = with_option(usual, group, path)
        if group == "perturbation":  # of the autoencoder's module alone
            config = composed(f"{group}={path.stem}", "module=autoencoder")
        place = "module" if group in ("loss", "perturbation") else group  # they stand in the module's node
        node = OmegaConf.to_container(config[place], resolve=True)
        if place == "module":  # its parts are handed in
            node = {k: v for k, v in node.items() if v != {}} | {"_partial_": True}
        if node:
            assert check_node(group, node) == [], path
            check_targets(node, group)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("debug", [None, *DEBUGS])
def test_every_experiment_composes_and_checks(experiment, debug):
    config = composed(f"experiment={experiment}", *([f"debug={debug}"] if debug else []))
    check(config)
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert text[0] == "# @package _global_" and text[1].startswith("# "), "say what it gives"


def test_sampling_tasks_compose_beside_an_experiment():
    for task in ("sample", "evaluate", "prepare", "encode"):
        check(composed("experiment=quickstart", f"task={task}"))


def test_root_keys_and_groups_do_not_share_names():
    folders = {p.name for p in CONF.iterdir() if p.is_dir()} - {"hydra"}
    assert folders == {name for name, key in schema().items() if key.is_group}


def test_each_file_builds_one_class():
    for path in CONF.glob("*/*.yaml"):
        assert yaml.safe_load(path.read_text()) is not None, f"{path} is empty: write {{}}"
        assert "**" not in path.read_text()


def test_wrong_values_are_all_named():
    node = {"_target_": "ldm.diffusion.schedulers.Cosine", "ofset": 0.1, "num_train_timesteps": "many"}
    problems = " ".join(check_node("scheduler", node))
    assert "Did you mean 'offset'?" in problems and "scheduler.num_train_timesteps='many': expected int" in problems


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (True, int, False),
        ("1e-3x", float, False),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], tuple[int, ...], True),
        ([1, "x"], list[int], False),
        ([0.9, 0.99], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ({"_target_": "x"}, int, True),
    ],
)
def test_types_of_values(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    "target", ["os.system", "builtins.open", "torch.load", "ldm.build.os.system", "urllib.request.urlretrieve"]
)
def test_configurations_build_from_the_allow_list_only(target, tmp_path):
    with pytest.raises(ConfigError, match=r"outside the packages|no such class"):
        build({"_target_": target, "command": f"touch {tmp_path}/x"}, "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "a red star, at the left",
        "50 % off = now",
        'it\'s "quoted" and \\backslashed\\',
        "[brackets] {braces} (parens)",
        "été, naïve, 画像 🎨",
        "${env:HOME} costs $5",
        "trailing backslash \\",
        "a: b; c|d #hash",
    ],
)
def test_free_text_reaches_the_configuration_unchanged(text):
    config = composed("task=sample", quoted(f"prompt={text}", multirun=False))
    assert config.prompt == text
