"""NaN and infinities are said where they arise, by part or tensor: no black picture, infinite file or broken JSON."""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from contextlib import contextmanager

import few
import lightning as L
import pytest
import torch
from adapter_files import random_hypernetwork, random_lora, weights
from commands import here
from merge_models import lora, saved, states
from safetensors.torch import load_file, save_file
from tiny_training import config, make_data, watched

import ldm.tasks.work.evaluate as evaluation
from ldm import Pipeline, merge
from ldm.adapters.content import Embedding
from ldm.errors import ConfigError, NotFinite
from ldm.formats.adapters import write_adapter
from ldm.formats.checkpoint import read, write
from ldm.pictures import to_bytes, to_pil
from ldm.training.run.directory import RunDirectory
from ldm.training.run.fit import train_run


def strictly(text: str) -> dict:
    """JSON as other programs read it: without NaN and Infinity."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# Pictures.


@pytest.fixture(scope="module")
def pipe(sd1_folder) -> Pipeline:
    return Pipeline.load(sd1_folder)


@contextmanager
def poisoned(module: torch.nn.Module, name: str, value: float = math.nan):
    tensor = module.get_parameter(name)
    before = tensor.data.clone()
    tensor.data[(0,) * tensor.ndim] = value
    try:
        yield
    finally:
        tensor.data.copy_(before)


GUILTY = [
    ("network", "conv_out.weight"),
    ("network", "mid_block.attentions.0.proj_in.bias"),
    ("text encoder", "text_model.final_layer_norm.bias"),
    ("autoencoder", "decoder.conv_out.bias"),
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("called", "name"), GUILTY, ids=[name for _, name in GUILTY])
def test_a_picture_that_is_not_finite_names_the_part(pipe, called, name, value):
    sampler = pipe.sampler
    parts = {"network": sampler.denoiser.model, "text encoder": sampler.text_encoder}
    with poisoned(parts.get(called, sampler.autoencoder), name, value):
        ways = [lambda: pipe("a cat", num_steps=1), lambda: pipe.sample("a cat", num_steps=1)]
        steps = list(pipe.steps("a cat", num_steps=1))
        for way in (*ways, lambda: pipe.decode(steps[-1].x0), lambda: sampler.frames(steps, [1])):
            with pytest.raises(NotFinite, match=f"not finite.*the {called}'s weights hold NaN or .* in {name}") as said:
                way()
            assert "\n" not in str(said.value) and isinstance(said.value, ConfigError)
    assert pipe.sample("a cat", num_steps=1).isfinite().all()


def test_numbers_that_grow_too_large_are_not_blamed_on_the_weights(pipe):
    with pytest.raises(NotFinite, match="latents grew beyond what float32 holds, and the weights are finite"):
        pipe.sample("a cat", num_steps=2, guidance=1e38)


def test_task_sample_writes_no_picture(sd1_folder, tmp_path, monkeypatch):
    load = Pipeline.load

    def damaged(*arguments):
        made = load(*arguments)
        made.sampler.denoiser.model.get_parameter("conv_out.bias").data[0] = math.nan
        return made

    monkeypatch.setattr(Pipeline, "load", damaged)
    options = ("num_steps=1", "film_strip=true", "output=out")
    done = here("task=sample", f"checkpoint={sd1_folder}", "prompt=a cat", *options, cwd=tmp_path)
    assert done.returncode == 2 and "the network's weights hold NaN" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.rglob("*.png"))


def test_nan_is_no_colour():
    picture = torch.zeros(2, 3, 4, 4)
    picture[1, 0, 2, 3] = math.nan
    for way in (lambda: to_bytes(picture), lambda: to_pil(picture[1])):
        with pytest.raises(NotFinite, match="a picture holds NaN"):
            way()
    assert to_pil(picture[0]).getpixel((0, 0)) == (128, 128, 128)
    assert to_bytes(torch.full((1, 3, 1, 1), math.inf)).min() == 255, "beyond the range is the end of the range"


# Training.


class Poison(L.Callback):
    """Spoils an average before anything is drawn with it; the training's own weights stay sound."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        [average] = [
            v for k, v in pl_module.ema.shadow.items() if k.endswith(("decoder.conv_out.bias", "model.conv_out.bias"))
        ]
        average[0] = math.nan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("stage", ["autoencoder", "latent_diffusion"])
def test_pictures_during_training_are_noted_and_training_goes_on(data, tmp_path, monkeypatch, caplog, stage):
    shards, _, latents = data
    options = ["callbacks.samples.every_n_steps=1", "callbacks.jump_to_x0.every_n_steps=1"]
    settings = config(
        f"shards={latents if stage == 'latent_diffusion' else shards}",
        f"module={stage}",
        "max_steps=2",
        "callbacks.validation.every_n_steps=1",
        *(options if stage == "latent_diffusion" else ["callbacks.reconstructions.every_n_steps=1"]),
    )
    with watched(monkeypatch, Poison()), caplog.at_level(logging.WARNING):
        run = train_run(settings, lambda digest: tmp_path / "run").path
    assert strictly((run / "status.json").read_text())["state"] == "finished"
    lines = [strictly(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"val/loss": None}.items() <= next(line for line in lines if "val/loss" in line).items()
    assert any(line.get("train/loss") is not None for line in lines)
    drawn = ("Samples", "JumpToX0") if stage == "latent_diffusion" else ("Reconstructions",)
    for name in drawn:
        assert any(f"{name} at step 1: no pictures" in message and "NaN" in message for message in caplog.messages)
    assert sum("val/loss is nan at step 1: null" in message for message in caplog.messages) == 1
    assert not [p for key in ("samples", "jump", "reconstructions") for p in (run / "images").glob(f"*{key}*")]


# Numbers in JSON.


def test_scores_that_are_not_finite_are_null_and_named(data, tmp_path, monkeypatch, capsys):
    shards, run, _ = data
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "scores", lambda *rest: {"psnr": math.inf, "ssim": math.nan, "mse": 0.5})
        settings = config(f"checkpoint={run}", f"shards={shards}", f"output={tmp_path / 'scores'}")
        found, _ = evaluation.evaluate_run(settings)
        assert found["psnr"] == math.inf
        written = strictly((tmp_path / "scores/evaluation.json").read_text())
        assert written["metrics"] == {"psnr": None, "ssim": None, "mse": 0.5}
        assert written["not_finite"] == {"psnr": "inf", "ssim": "nan"}
        assert "psnr is inf, ssim is nan" in capsys.readouterr().out
        again, _ = evaluation.evaluate_run(settings)  # read, not computed
        assert math.isnan(again["psnr"]) and again["mse"] == 0.5


def test_a_run_directory_of_settings_that_json_has_not_opens_again(tmp_path):
    identity = {"guider": {"interval": [0.0, math.inf]}, "x": math.nan, "y": -math.inf, "lr": 1e-3}
    for _ in range(2):
        directory = RunDirectory(tmp_path / "run", {}, identity)
        directory.open()
        directory.event("stop", reason=math.nan)
        directory.close()
    kept = strictly((tmp_path / "run/run.json").read_text())["identity"]
    assert kept == {"guider": {"interval": [0.0, "inf"]}, "x": "nan", "y": "-inf", "lr": 1e-3}
    assert all(strictly(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines())
    with pytest.raises(ConfigError, match="another configuration"):
        RunDirectory(tmp_path / "run", {}, identity | {"y": math.inf}).open()


# Files in half precision.


@pytest.fixture(scope="module")
def published_states(sd1_folder):
    return read(sd1_folder)


LARGE = [
    ("unet", "conv_out.weight"),
    ("vae", "decoder.conv_out.bias"),
    ("text_encoder", "text_model.final_layer_norm.bias"),
]


@pytest.mark.parametrize(("part", "name"), LARGE)
def test_half_precision_is_refused_where_it_would_be_infinite(published_states, tmp_path, part, name):
    state = published_states.states[part]
    before = state[name].clone()
    state[name].view(-1)[-1] = -1e6
    try:
        for format, file in (("diffusers", "folder"), ("compvis", "x.safetensors")):
            with pytest.raises(NotFinite, match=r"reaches 1e\+06, and float16 holds 65504 at most.*dtype=bfloat16"):
                write(published_states, tmp_path / file, format, "float16")
            assert not list(tmp_path.iterdir()), "nothing is left behind"
        write(published_states, tmp_path / "wide.safetensors", "compvis", "bfloat16")
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "wide.safetensors").values())
        state[name].view(-1)[-1] = math.nan
        with pytest.raises(NotFinite, match=r"holds NaN or infinities: its training diverged"):
            write(published_states, tmp_path / "folder", "diffusers", "float32")
    finally:
        state[name].copy_(before)


def test_a_ckpt_in_half_precision_too(published_states, tmp_path, small_is_published, monkeypatch):
    from ldm.formats import published

    monkeypatch.setitem(published.UNETS, ((32, 64, 64, 64), 32), {"head_dim": None, "num_heads": 8, "norm_groups": 8})
    state = published_states.states["unet"]
    before = state["conv_out.bias"].clone()
    state["conv_out.bias"][1] = 7e4
    try:
        with pytest.raises(NotFinite, match=r"model.diffusion_model.out.2.bias reaches 7e\+04"):
            write(published_states, tmp_path / "x.ckpt", "compvis", "float16")
    finally:
        state["conv_out.bias"].copy_(before)
    assert not list(tmp_path.iterdir())


def test_adapters_in_half_precision(published_states, tmp_path):
    large = random_lora(weights(published_states), layers=r"unet\.mid_block\.attentions\.0.*")
    first = next(iter(large.layers.values()))
    first.up.view(-1)[0] = 1e5
    word = Embedding("<new>", torch.full((2, 32), 1e5))
    network = random_hypernetwork()
    network.networks[32][1]["linear.0.weight"][0, 0] = 1e5
    for content, format, end in [
        (large, "kohya", "safetensors"),
        (large, "peft", "safetensors"),
        (word, "diffusers", "safetensors"),
        (word, "a1111", "pt"),
        (network, "a1111", "pt"),
    ]:
        with pytest.raises(NotFinite, match=r"reaches 1e\+05, and float16 holds 65504 at most"):
            write_adapter(content, tmp_path / f"x.{end}", format, "float16")
        assert not list(tmp_path.iterdir())
        write_adapter(content, tmp_path / f"x.{end}", format, "bfloat16")
        (tmp_path / f"x.{end}").unlink()


# Merging.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    place = tmp_path_factory.mktemp("merge")
    return [saved(place, 1, "diffusers"), saved(place, 2, "diffusers")]


@pytest.fixture(scope="module")
def spoilt(pair, tmp_path_factory):
    """The second checkpoint with one NaN in it."""
    folder = shutil.copytree(pair[1], tmp_path_factory.mktemp("spoilt") / "spoilt")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_out.weight"].view(-1)[3] = math.nan
    save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["sum", "add_difference", "extract", "lora"])
def test_merging_names_the_tensor_and_the_input_that_is_not_finite(pair, spoilt, tmp_path, method):
    one, _ = pair
    given = {"sum": [one, spoilt], "add_difference": [one, spoilt, one], "extract": [one, spoilt], "lora": [spoilt]}
    write_adapter(lora(5, 2), tmp_path / "update.safetensors", "peft")
    inputs = given[method] + ([tmp_path / "update.safetensors"] if method == "lora" else [])
    rank = 2 if method == "extract" else None
    with pytest.raises(NotFinite, match=r"spoilt holds NaN or infinities in unet.conv_out.weight"):
        merge(inputs, tmp_path / "x.safetensors", method=method, rank=rank)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_one_byte_are_merged_too(pair, tmp_path, dtype):
    """They know few operations, isfinite not among them."""
    file = "unet/diffusion_pytorch_model.safetensors"
    folder = shutil.copytree(pair[1], tmp_path / "narrow")
    for place in (folder / file, folder / "vae/diffusion_pytorch_model.safetensors"):
        save_file({k: v.to(dtype) for k, v in load_file(place).items()}, place, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge([folder, pair[0]], tmp_path / "x.safetensors", dtype="float16")
        merge([pair[0], folder], tmp_path / "lora.safetensors", method="extract", rank=2)
    narrow = load_file(folder / file)["conv_out.weight"].float()
    found = states(tmp_path / "x.safetensors")["unet"]["conv_out.weight"]
    torch.testing.assert_close(found, (0.5 * narrow + 0.5 * states(pair[0])["unet"]["conv_out.weight"]).half().float())


def test_merging_to_infinity_is_refused(pair, tmp_path):
    with pytest.raises(NotFinite, match=r"(unet|text_encoder)\.\S+ would be infinite with ratios=\[1e\+39, -1e\+39\]"):
        merge(pair, tmp_path / "x.safetensors", ratios=[1e39, -1e39])
    name = "conv_out.weight"
    factor = 2e5 / float(states(pair[0])["unet"][name].abs().max())
    with pytest.raises(NotFinite, match=r"reaches .*, and float16 holds 65504 at most"):
        merge(pair, tmp_path / "x.safetensors", ratios=[factor, 0], dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_adapter_of_a_run_that_is_not_finite_is_refused(small_base, tmp_path, monkeypatch):
    import ldm.checkpoints.adapters as adapters

    options = [f"images={few.make_pictures(tmp_path / 'mine', 3)}", "adapter=[lora]", "instance_prompt=a thing"]
    trained = few.run("finetune", small_base, tmp_path, *options)
    pipe = Pipeline.load(small_base)
    read_parts = adapters.load_parts

    def diverged(*arguments, **options):
        states = read_parts(*arguments, **options)
        next(iter(states["lora"].values())).fill_(math.nan)
        return states

    monkeypatch.setattr(adapters, "load_parts", diverged)
    with pytest.raises(NotFinite, match=r"holds NaN or infinities in its lora .*give another step of the run"):
        pipe.load_adapter(trained)
    assert not pipe.adapters and pipe.sample("a", num_steps=1).isfinite().all()
