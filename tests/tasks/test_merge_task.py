"""task=merge: the command as it is typed, and one clear line for what cannot be merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from commands import here
from conf_nodes import composed
from merge_models import PARTS, lora, model, nodes, saved, states
from omegaconf import OmegaConf

from ldm import merge
from ldm.adapters.content import Lora, LowRank
from ldm.checkpoints.components import Components
from ldm.checkpoints.save import save_any
from ldm.config.schema import check_keys_are_read
from ldm.errors import ConfigError
from ldm.formats.adapters import write_adapter
from ldm.run import quoted
from ldm.tasks.merge import Merge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("merge task")  # a path with a space


@pytest.fixture(scope="module")
def pair(place) -> list[str]:
    return [str(saved(place, 1, "diffusers")), str(saved(place, 2, "ldm"))]


@pytest.fixture(scope="module")
def update(place) -> str:
    write_adapter(lora(5, 2), place / "a lora.safetensors", "peft")
    return str(place / "a lora.safetensors")


def test_the_command_merges(place, pair):
    command = ("task=merge", f"checkpoints=[{','.join(pair)}]", "ratios=[0.25,0.75]", "output=my, merge.safetensors")
    done = here(*command, cwd=place)
    assert (done.returncode, done.stdout) == (0, "merged: my, merge.safetensors\n"), done.stderr
    one, other, found = (states(Path(p)) for p in (*pair, place / "my, merge.safetensors"))
    for part in PARTS:
        for name, tensor in found[part].items():
            torch.testing.assert_close(tensor, 0.25 * one[part][name] + 0.75 * other[part][name], atol=1e-6, rtol=1e-6)


def test_the_command_adds_a_lora_and_keeps_its_recipe(place, pair, update):
    done = here("task=merge", "method=lora", f"checkpoints=[{pair[1]}, '{update}']", "output=added", cwd=place)
    assert (done.returncode, done.stdout) == (0, "merged: added\n"), done.stderr
    recipe = yaml.safe_load((place / "added/config.yaml").read_text())["merge"]
    assert recipe == {"checkpoints": [pair[1], update], "method": "lora", "ratios": [1.0], "rank": None}
    assert not torch.equal(
        states(place / "added")["unet"]["conv_in.weight"], states(Path(pair[1]))["unet"]["conv_in.weight"]
    )


def test_lists_of_paths_reach_the_configuration_unchanged():
    typed = "[a b,c=d.ckpt,'x, y', \"it's\" ,é (1) {2},50 %,${HOME},z\\]"
    config = composed("task=merge", quoted(f"checkpoints={typed}", multirun=False))
    read = ["a b", "c=d.ckpt", "x, y", "it's", "é (1) {2}", "50 %", "${HOME}", "z\\"]
    assert [str(path) for path in config.checkpoints] == read
    assert quoted("checkpoints=[]", multirun=False) == "checkpoints=[]"


def test_what_is_typed_wrong_is_one_line(place, pair):
    task = composed("task=merge")
    for typed, words in [
        ({"output": "x"}, r"task=merge needs checkpoints=, for example checkpoints=\["),
        ({"checkpoints": pair}, "task=merge needs output=, for example output=PATH"),
        ({"checkpoints": pair[0], "output": "x"}, r"give a list in brackets, for example checkpoints=\[A,B\]"),
        ({"checkpoints": pair, "output": "x", "ratios": 0.5}, r"ratios=0.5: give a list .* ratios=\[0.7,0.3\]"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Merge.run(OmegaConf.merge(task, typed))
    done = here("task=merge", "checkpoints=[no where,x]", "output=x", cwd=place)
    assert (done.returncode, done.stderr) == (2, "error: checkpoint=no where: there is nothing at this path.\n")
    with pytest.raises(ConfigError, match="rank= is not read by task=convert, but by task=merge"):
        check_keys_are_read("convert", ["rank=3"])


def test_wrong_numbers_and_kinds_of_inputs(place, pair, update):
    new = place / "never"
    (place / "there").mkdir()
    for checkpoints, options, words in [
        (pair, {"method": "mean"}, "method=mean is not known: choose one of sum, add_difference, lora, extract"),
        (pair[:1], {}, "method=sum takes two or more checkpoints, not 1"),
        (pair, {"method": "add_difference"}, r"takes three checkpoints, not 2: checkpoints=\[A,B,C\]"),
        ([*pair, pair[0]], {"method": "extract", "rank": 2}, r"takes two checkpoints, not 3: .*\[BASE,TUNED\]"),
        (pair, {"ratios": [1.0]}, r"ratios=\[1.0\]: method=sum takes 2 of them here \(one a checkpoint\), not 1"),
        ([*pair, pair[0]], {"method": "add_difference", "ratios": [1, 2]}, "takes 1 of them here .one, of the diff"),
        (pair, {"method": "extract", "rank": 2, "ratios": [1.0]}, "takes 0 of them here, not 1"),
        (pair, {"ratios": [0, 0]}, "finite numbers, not all of them 0"),
        (pair, {"ratios": [float("nan"), 1]}, "finite numbers"),
        (pair, {"rank": 4}, "rank=4: a number above 0, for method=extract or a sum of LoRAs"),
        (pair, {"method": "extract"}, "method=extract needs rank="),
        (
            pair,
            {"method": "extract", "rank": 10_000},
            "rank=10000: no layer of this model has more than 128 directions",
        ),
        ([pair[0], update], {}, "a lora.safetensors is a LoRA, and method=sum takes whole checkpoints: method=lora"),
        ([update, pair[0]], {"method": "extract", "rank": 2}, "is a LoRA, and method=extract takes whole checkpoints"),
        ([update, update], {"method": "lora"}, "method=lora starts from a checkpoint, and .* is a LoRA"),
        ([*pair], {"method": "lora"}, "2-ours is a checkpoint, not a LoRA"),
        ([update, update], {"rank": 9, "output": f"{new}.safetensors"}, "rank=9: the sum has rank 4 at most"),
        ([update, update], {}, "never: a LoRA is one file, so give a name that ends in .safetensors"),
        ([update, update], {"format": "compvis", "output": f"{new}.safetensors"}, "format=compvis is not for LoRAs"),
        (pair, {"format": "peft"}, "format=peft is not known: choose one of ldm, diffusers, compvis"),
        (pair, {"output": place / "there"}, "there exists already: give another output="),
        (pair, {"format": "compvis"}, r"is a \.safetensors or a \.ckpt"),
        (pair, {"dtype": "float16", "format": "ldm"}, "dtype=float16: format=ldm stores float32"),
        (pair, {"weights": "best"}, "weights=best is not known"),
        (pair[1:] * 2, {"method": "extract", "rank": 2, "output": f"{new}.safetensors"}, "nothing to extract"),
    ]:
        options = {"output": new, **options}
        if options.get("method") == "extract":
            options["output"] = f"{new}.safetensors"
        with pytest.raises(ConfigError, match=words) as raised:
            merge(checkpoints, **options)
        assert "\n" not in str(raised.value)
    assert not list(place.glob("never*"))


def test_models_of_other_kinds_are_refused_by_the_node_that_differs(place, pair):
    others = {
        "model.num_heads": {"model": {"head_dim": None, "num_heads": 2}},
        "text_encoder.layers": {"text_encoder": {"layers": 2}},
        "scheduler.beta_end": {"scheduler": {"beta_end": 0.02}},
        "parameterization": {"parameterization": {"_target_": "ldm.diffusion.parameterizations.V"}},
    }
    for key, changes in others.items():
        other = place / f"other-{key}"
        save_any(model(3, **changes), other, "ldm")
        named = key if key != "model.num_heads" else "model.head_dim"
        with pytest.raises(ConfigError, match=f"other-{key} has {named}=.*1-folder has "):
            merge([pair[0], other], place / "never")
    autoencoder = Components(model(3).autoencoder, config=nodes())
    save_any(autoencoder, place / "vae", "ldm")
    with pytest.raises(ConfigError, match=r"vae is an autoencoder and .*1-folder a whole model"):
        merge([pair[0], place / "vae"], place / "never")
    words = place / "other words"
    save_any(model(3, captions=["entirely different words stand here"]), words, "diffusers")
    with pytest.raises(ConfigError, match="have different vocabularies"):
        merge([pair[0], words], place / "never")
    assert not list(place.glob("never*"))


def test_loras_for_other_models_are_refused_by_their_layers(place, pair):
    for name, layers, words in [
        ("stray", {"unet.no.layer": (2, 3)}, r"changes 1 layer that this base does not have: unet\.no\.layer"),
        (
            "wide",
            {"unet.time_embedding.linear_1": (7, 3)},
            r"time_embedding\.linear_1, \(7, 3\) there, \(128, 32\) here",
        ),
    ]:
        found = {k: LowRank(torch.ones(1, n), torch.ones(m, 1), 1.0) for k, (m, n) in layers.items()}
        write_adapter(Lora(found), place / f"{name}.safetensors", "peft")
        with pytest.raises(ConfigError, match=words):
            merge([pair[0], place / f"{name}.safetensors"], place / "never", method="lora")
    assert not list(place.glob("never*"))
