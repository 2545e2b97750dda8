"""Memory of fine-tuning: frozen parts in half precision, 8-bit optimizer state, and what task=plan says beforehand."""

import json
import sys
import types

import pytest
import torch
from tiny_training import Killed, Spy, config, fingerprint, make_data, train_watched
from torch import nn

from ldm.build import build
from ldm.errors import ConfigError
from ldm.training.assemble import load_trained
from ldm.training.checkpoints import all_folders, find, load_parts

FEW = ["callbacks.validation=null", "callbacks.jump_to_x0=null", "callbacks.samples.every_n_steps=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(shards, a run that was trained on them): what a run starts from it with, its averages, is no file of its own."""
    folder = tmp_path_factory.mktemp("base")
    shards, autoencoder, _ = make_data(folder)
    settings = config(f"shards={shards}", f"checkpoint={autoencoder}", "max_steps=3", "optimizer.lr=1e-2", *FEW)
    with pytest.MonkeyPatch.context() as patch:
        train_watched(settings, folder / "run", patch, Spy())
    return shards, folder / "run"


class Types(Spy):
    """Also keeps what was in memory at the first step: (trained, type) of every tensor."""

    def on_train_start(self, trainer, pl_module):
        self.types = {n: (p.requires_grad, p.dtype) for n, p in pl_module.named_parameters()}
        self.buffers = {b.dtype for b in pl_module.autoencoder.latents.buffers()}


def run(directory, base, monkeypatch, spy, *overrides):
    shards, start = base
    given = [f"shards={shards}", f"checkpoint={start}", "adapter=[lora]", "adapter.lora.lr=1e-2", "max_steps=4"]
    given += ["callbacks.checkpoints.every_n_steps=2", *FEW]
    train_watched(config(*given, *overrides), directory, monkeypatch, spy)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_frozen_parts_in_bfloat16(base, tmp_path, monkeypatch):
    """Half the memory, nearly the same losses; checkpoints hold the base as it was; a killed run goes on exactly."""
    spy, half = Types(), "frozen_dtype=bfloat16"
    full = run(tmp_path / "full", base, monkeypatch, Spy())
    whole = run(tmp_path / "half", base, monkeypatch, spy, half)
    assert {kind for kind in spy.types.values()} == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(trained == name.startswith("adapters.") for name, (trained, _) in spy.types.items())
    assert spy.buffers == {torch.float32}  # the latents' units are no weights
    assert len(whole) == 4 and whole != full
    assert whole == pytest.approx(full, rel=0.02)
    # The averaged base bit for bit, in the first checkpoint and in those linked from it.
    expected = load_parts(find(base[1]), "ema")
    for folder in all_folders(tmp_path / "half"):
        states = load_parts(folder, "raw")
        for part in ("unet", "vae", "text_encoder"):
            assert states[part].keys() == expected[part].keys()
            for name, tensor in states[part].items():
                assert tensor.dtype == expected[part][name].dtype
                assert torch.equal(tensor.nan_to_num(), expected[part][name].nan_to_num())
        assert {t.dtype for t in states["lora"].values()} == {torch.float32}
    # Loaded for sampling it is an ordinary model and its adapter.
    parts, _, _ = load_trained(tmp_path / "half")
    assert {p.dtype for p in parts.denoiser.model.parameters()} == {torch.float32}
    # Killed before its first checkpoint, and after it.
    for step in (1, 3):
        with pytest.raises(Killed):
            run(tmp_path / "killed", base, monkeypatch, Spy(die_at=("backward", step)), half)
    assert run(tmp_path / "killed", base, monkeypatch, Spy(), half) == whole
    ends = [fingerprint(all_folders(tmp_path / name)[-1]) for name in ("half", "killed")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["frozen_dtype=int8"], "choose one of float32"), (["frozen_dtype=bfloat16", "module=autoencoder"], "nothing")],
)
def test_types_that_cannot_be_are_refused(overrides, message, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        train_watched(config("shards=/nowhere", *overrides), tmp_path / "run", monkeypatch, Spy())
    assert not (tmp_path / "run").exists()


def pairs(device):
    """A convolution in the layout that models are trained in, and a vector: (name, parameter) as the trainer gives."""
    convolution = nn.Conv2d(8, 8, 3, device=device).to(memory_format=torch.channels_last)
    return list(convolution.named_parameters())


def test_8bit_adamw_is_bitsandbytes_with_our_keys(monkeypatch):
    """A stand-in takes the place of bitsandbytes, and the meta device that of a GPU."""
    library, optim = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    given = {}

    class AdamW8bit(torch.optim.SGD):
        def __init__(self, params, lr, betas, weight_decay, eps):
            given.update(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
            super().__init__(params, lr=lr)

    optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    make = build(config("optimizer=adamw8bit", "optimizer.lr=3e-4")["optimizer"], "optimizer")
    named = pairs("meta")
    optimizer = make(named)
    assert isinstance(optimizer, AdamW8bit)
    assert given == {"lr": 3e-4, "betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}
    (group,) = optimizer.param_groups
    assert all(ours is theirs for (_, ours), theirs in zip(named, group["params"], strict=True))
    assert all(p.is_contiguous() for p in group["params"])  # its kernels would change the layout at the first step
    with pytest.raises(ConfigError, match="works on a GPU"):
        make(pairs("cpu"))


def test_8bit_adamw_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python keeps where an import is to fail
    with pytest.raises(ConfigError, match=r"pip install \"ldm\[8bit\]\", or choose optimizer=adamw"):
        build(config("optimizer=adamw8bit")["optimizer"], "optimizer")(pairs("meta"))
