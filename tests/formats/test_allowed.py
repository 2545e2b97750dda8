"""A checkpoint of somebody else is data: nothing in its configuration is imported, resolved or run."""

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import here
from evil import MODULE, fuzzed, kinds, watched
from omegaconf import OmegaConf
from tiny_training import config as tiny_config

from ldm import Pipeline
from ldm.allowed import BUILT, only_allowed, refuse_nodes
from ldm.build import as_literal, build
from ldm.checkpoints.components import build_components
from ldm.checkpoints.folder import Content, read_config, write
from ldm.config.root import plain
from ldm.errors import ConfigError
from ldm.formats.content import DIFFUSION_NODES
from ldm.text.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint folder of ours with fresh weights, without the run around it."""
    folder = tmp_path_factory.mktemp("whole") / "step-00000001"
    config = tiny_config() | {"image_size": 32}
    parts = build_components(config)
    parts.text_encoder.set_tokenizer(build_tokenizer(["a red star"], config["text_encoder"]["vocab_size"]))
    states = {name: dict(module.state_dict()) for name, module in parts.modules().items()}
    channels = len(states["vae"]["latents.mean"])
    states["vae"] |= {"latents.mean": torch.zeros(channels), "latents.scale": torch.ones(channels)}
    text = yaml.safe_dump(config, sort_keys=False)
    write(folder, Content(states, {}, {"global_step": 1}, text, (), parts.text_encoder.save_tokenizer), step=1)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "theirs")


def rewritten(folder, config):
    """The folder with another configuration and fitting digests, as whoever sends it would."""
    text = yaml.safe_dump(config, sort_keys=False)
    (folder / "config.yaml").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["config.yaml"] = {"bytes": len(text.encode()), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Evil:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_what_is_built_here_is_read_again(copy):
    assert read_config(copy) == yaml.safe_load((copy / "config.yaml").read_text())
    assert Pipeline.load(copy).sample("a red star", num_steps=1).isfinite().all()


DOORS = (
    ("task=sample", "prompt=x", "output=out"),
    ("task=convert", "format=diffusers", "output=out"),
    ("task=evaluate", "output=out"),
    ("adopt=true", "shards=x"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(Path("x")))
def test_evil_configurations_are_refused_before_anything_happens(kind, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_SECRET", "secret-of-this-machine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prey").mkdir()
    torch.save(Evil(), tmp_path / "evil.pt")
    evil = kinds(tmp_path)
    rewritten(copy, read_config(copy) | evil[kind])
    with watched(tmp_path) as seen, pytest.raises(ConfigError) as error:
        Pipeline.load(copy)
    door = DOORS[list(evil).index(kind) % len(DOORS)]  # each composes for a second
    done = here(*door, f"checkpoint={copy}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not seen
    assert "secret" not in str(error.value) + done.stderr + done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"{MODULE}.py", "prey", "evil.pt", "theirs"])


SAMPLER = {
    "_target_": "ldm.diffusion.samplers.solver.Solver",
    "solve": {
        "_target_": "ldm.diffusion.samplers.heun.heun",
        "_partial_": True,
        "churn": {"_target_": "ldm.diffusion.samplers.churn.Churn", "amount": 40},
    },
    "limit": {"_target_": "ldm.diffusion.thresholding.clip", "_partial_": True, "limit": 2.0},
}


@pytest.mark.slow
def test_two_thousand_fuzzed_trees_run_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_SECRET", "secret-of-this-machine")
    monkeypatch.chdir(tmp_path)
    valid = read_config(checkpoint)
    nodes = {k: valid[k] for k in (*DIFFUSION_NODES, "module", "trainer", "callbacks")}
    nodes |= {"sampler": SAMPLER, "grid": {}, "guider": {}, "adapter": {}}
    draw, built, refused = random.Random(0), 0, 0
    with watched(tmp_path) as seen:
        for _ in range(2000):
            try:
                config = only_allowed(fuzzed(nodes, draw), "theirs")
                with torch.device("meta"):
                    for group in set(BUILT) - {"adapter"}:
                        if config.get(group) != nodes[group]:
                            build(config.get(group), group)
                            built += 1
            except ConfigError as error:
                refused += 1
                assert "secret" not in str(error)
    assert not seen
    assert built > 30 and refused > 1000, (built, refused)


def test_options_that_no_file_of_conf_names_are_known_in_their_places():
    config = only_allowed({"sampler": SAMPLER}, "theirs")
    assert build(config["sampler"], "sampler").limit.keywords == {"limit": 2.0}
    moved = {**SAMPLER, "solve": {**SAMPLER["solve"], "churn": SAMPLER["limit"]}}
    with pytest.raises(ConfigError, match=r"sampler\.solve\.churn names ldm\.diffusion\.thresholding\.clip"):
        only_allowed({"sampler": moved}, "theirs")


def test_code_of_ones_own_is_named_by_ldm_allow(tmp_path, monkeypatch):
    package = tmp_path / "mine_of_allowed"
    package.mkdir()
    (package / "__init__.py").write_text("import shutil\nfrom mine_of_allowed.net import Net, helper\n")
    (package / "net.py").write_text(
        "class Net:\n    def __init__(self, size: int = 3): self.size = size\n"
        "    @staticmethod\n    def gone(): pass\ndef helper(): return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    node = {"_target_": "mine_of_allowed.Net", "size": 5}
    with pytest.raises(ConfigError, match="LDM_ALLOW"):
        only_allowed({"model": node}, "theirs")
    assert "mine_of_allowed" not in sys.modules
    for allowed in ("mine_of_allowed", "other, mine_of_allowed.Net"):
        monkeypatch.setenv("LDM_ALLOW", allowed)
        assert build(only_allowed({"model": node}, "theirs")["model"], "model").size == 5
    monkeypatch.setenv("LDM_ALLOW", "mine_of_allowed")
    for target in ("mine_of_allowed.shutil.rmtree", "mine_of_allowed.Net.gone", "mine_of_allowedx.Net"):
        with pytest.raises(ConfigError, match="names"):
            only_allowed({"model": {"_target_": target}}, "theirs")
    monkeypatch.setenv("LDM_ALLOW", "mine_of_allowed.Net")
    with pytest.raises(ConfigError, match="names"):
        only_allowed({"model": {"_target_": "mine_of_allowed.helper"}}, "theirs")


def test_what_is_not_built_from_a_file_loses_the_names_that_conf_does_not_give():
    adamw = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}
    theirs = {"callbacks": {"mine": {"_target_": "os.system", "command": "x"}}, "optimizer": adamw}
    assert only_allowed(theirs, "theirs") == {"callbacks": {"mine": {"command": "x"}}, "optimizer": adamw}


@pytest.mark.parametrize("change", [{"module": "gan"}, {"module": 5}, {"model": None}, {"scheduler": {}}])
def test_a_checkpoint_needs_what_it_is_rebuilt_from(change, copy):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        Pipeline.load(rewritten(copy, read_config(copy) | change))


@pytest.mark.parametrize(
    "change",
    [{"sampler": {"x": 1}}, {"grid": {"x": 1}}, {"scheduler_config": "x"}, {"scheduler_config": [1]}, {"data": "text"}],
)
def test_what_is_read_beside_the_model_has_its_shape(change, copy):
    with pytest.raises(ConfigError, match=next(iter(change))):
        read_config(rewritten(copy, yaml.safe_load((copy / "config.yaml").read_text()) | change))


def test_a_checkpoint_that_does_not_say_its_size_is_drawn_in_the_size_that_is_given(copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    del config["image_size"]
    pipe = Pipeline.load(rewritten(copy, config))
    assert pipe.sample("a red star", num_steps=1, height=16, width=16).shape[-1] == 16
    with pytest.raises(ConfigError, match="height= and width="):
        pipe.sample("a red star", num_steps=1)


def test_text_comes_back_from_omegaconf_as_it_went_in():
    draw, pieces = random.Random(0), ["\\", "\\\\", "${", "}", "a", "oc.env:HOME", "${oc.env:HOME}", "'", '"', "???"]
    for _ in range(500):
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 8)))
        config = OmegaConf.create({"kept": 1, "node": None})
        config.node = as_literal({"text": text, "many": [text]})
        assert plain(OmegaConf.merge(config, {"kept": 2})) == {"kept": 2, "node": {"text": text, "many": [text]}}


def test_a_node_of_plain_data_is_taken_as_it_is(monkeypatch):
    """Class names come from captions: somebody's text with ${ in it is no question to the environment."""
    monkeypatch.setenv("LDM_SECRET", "secret")
    made = build({"_target_": "ldm.text.classes.ClassTable", "classes": ["${oc.env:LDM_SECRET}", "b"]}, "text_encoder")
    assert made.classes == ["${oc.env:LDM_SECRET}", "b"]


def test_a_name_outside_the_packages_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "mine_outside.py").write_text("class X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="LDM_ALLOW=yourpackage"):
        build({"_target_": "mine_outside.X"}, "model")
    assert "mine_outside" not in sys.modules


def test_other_programs_settings_describe_no_objects():
    with pytest.raises(ConfigError, match="names code to run"):
        refuse_nodes({"beta_start": 1, "solver_order": [{"_target_": "os.system"}]}, "scheduler_config.json")
    refuse_nodes({"beta_start": 1, "betas": [1, 2]}, "scheduler_config.json")
