"""Checkpoints against each other: what the tests of ldm/formats share."""

from __future__ import annotations

import shutil

import torch
import yaml
from tiny_training import CONF

from ldm.build import build
from ldm.formats.checkpoint import Stored
from ldm.text.tokenizer import load_tokenizer

NODES = {"unet": "model", "vae": "autoencoder", "text_encoder": "text_encoder"}
PROMPTS = ["a red cat", "café 猫 <b>100%</b>!", ""]


def filled(checkpoint: Stored) -> dict[str, torch.nn.Module]:
    """Our modules, built from the nodes and filled strictly."""
    modules = {part: build(checkpoint.config[NODES[part]], NODES[part]).eval() for part in checkpoint.states}
    for part, module in modules.items():
        module.load_state_dict(checkpoint.states[part])
    if checkpoint.tokenizer and "text_encoder" in modules:
        modules["text_encoder"].load_tokenizer(checkpoint.tokenizer)
    return modules


def conf(group: str, name: str) -> dict:
    """A node of conf/, as it is written there."""
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


def same(one: dict, other: dict) -> bool:
    """Whether two states are equal bit for bit; the preview, which nobody publishes, is NaN in both."""
    return one.keys() == other.keys() and all(
        other[k].dtype == torch.float32 and torch.equal(v.nan_to_num(7.0), other[k].nan_to_num(7.0))
        for k, v in one.items()
    )


def assert_same(one: Stored, other: Stored) -> None:
    assert one.states.keys() == other.states.keys()
    for part in one.states:
        assert same(one.states[part], other.states[part]), part
    assert one.config == other.config
    assert one.scheduler_config == other.scheduler_config
    if one.tokenizer:
        words, others = (load_tokenizer(c.tokenizer) for c in (one, other))
        assert words(PROMPTS)["input_ids"] == others(PROMPTS)["input_ids"]
        assert (words.pad_token, words.model_max_length) == (others.pad_token, others.model_max_length)


def aligned(pipeline):
    """The pipeline with weights in memory of their own: kernels round differently by where a mapped file puts them."""
    for part in NODES:
        for parameter in getattr(pipeline, part).parameters():
            parameter.data = parameter.data.clone()
    return pipeline


def hub_copy(cache, name: str, folder) -> None:
    """A folder as the hub's client keeps it."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots/abc")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")
