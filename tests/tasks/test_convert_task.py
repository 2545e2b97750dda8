"""task=convert: whatever a model came as, it leaves as anything, and draws the same picture there."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import diffusers
import published as published_models
import pytest
import torch
from commands import here
from conf_nodes import composed
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiny_training import config

from ldm import Pipeline
from ldm.checkpoints.load import load_any
from ldm.errors import ConfigError
from ldm.pictures import from_pil
from ldm.tasks.convert import Convert
from ldm.training.run.fit import train_run

pytestmark = pytest.mark.slow
PROMPT = "a red star on a chair"
NAMES = {"ldm": "as_ldm", "diffusers": "as_diffusers", "compvis": "one.safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def sources(place, tiny_run, sd1_folder) -> dict[str, Path]:
    """A model in each layout: one trained here (a small text encoder, standardised latents), and published ones."""
    command = ("task=convert", f"checkpoint={sd1_folder}", "format=compvis", "output=published.safetensors")
    result = here(*command, cwd=place)
    assert (result.returncode, result.stdout) == (0, "converted: published.safetensors\n"), result.stderr
    return {"ldm": tiny_run, "diffusers": sd1_folder, "compvis": place / "published.safetensors"}


@cache
def task():
    return composed("task=convert")


def converted(checkpoint: Path, output: Path, format: str, **options: str) -> Path:
    settings = OmegaConf.merge(
        task(), {"checkpoint": str(checkpoint), "output": str(output), "format": format, **options}
    )
    assert Convert.run(settings) == {}
    return output


@cache
def picture(checkpoint: Path) -> torch.Tensor:
    return Pipeline.load(checkpoint).sample(PROMPT, "an old photograph", num_steps=2, guidance=3.0, seed=1)


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("format", NAMES)
def test_the_same_picture_from_every_layout_in_every_layout(place, sources, source, format):
    output = converted(sources[source], place / f"{source}-{NAMES[format]}", format)
    assert not list(place.glob("*.part"))
    # Standardised latents are folded into the autoencoder's convolutions where a format has one scaling factor only.
    folds = source == "ldm" and format != "ldm"
    drawn, expected = picture(output), picture(sources[source])
    assert expected.std() > 0.05
    torch.testing.assert_close(drawn, expected, atol=2e-5 if folds else 1e-6, rtol=0)


def test_what_was_converted_is_sampled_and_named_in_its_recipe(place, sources):
    output = converted(sources["compvis"], place / "named", "ldm")
    command = ("task=sample", "checkpoint=named", f"prompt={PROMPT}", "num_steps=2", "seed=1", "guidance=3")
    result = here(*command, "negative_prompt=an old photograph", "output=drawn", cwd=place)
    assert result.returncode == 0, result.stderr
    drawn = Image.open(place / "drawn/0000.png")
    assert json.loads(drawn.text["ldm"])["checkpoint"] == str(output)
    torch.testing.assert_close(from_pil(drawn)[None], picture(output), atol=0.005, rtol=0)


def test_training_starts_from_what_was_converted(place, tiny_run):
    """At a learning rate of 0 the network that leaves the training is the one that was converted."""
    output = converted(tiny_run, place / "to_train_from", "ldm")
    shards = next((tiny_run.parent / "stages").glob("shards-*"))
    settings = config(f"shards={shards}", f"checkpoint={output}", "max_steps=1", "optimizer.lr=0.0")
    trained = train_run(settings, lambda digest: place / "trained").path
    before, after = (load_any(p, "raw").denoiser.model.state_dict() for p in (output, trained))
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("steps", [4, 10])
def test_diffusers_draws_what_a_model_trained_here_draws(place, tiny_run, steps):
    folder = place / "for_diffusers"
    if not folder.exists():
        converted(tiny_run, folder, "diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    ours = Pipeline.load(tiny_run)
    for guidance in (2.0, 7.5):
        expected = published_models.draw(theirs, PROMPT, steps, height=32, width=32, guidance_scale=guidance)
        drawn = ours.sample(PROMPT, num_steps=steps, guidance=guidance)
        assert expected.std() > 0.01
        assert ((drawn / 2 + 0.5) - expected).abs().max() < 1e-4
    assert (theirs.unet.config.sample_size, theirs.vae_scale_factor) == (8, 4)


def test_averaged_weights_leave_unless_raw_ones_are_asked_for(place, tiny_run):
    averaged = converted(tiny_run, place / "averaged", "ldm")
    raw = converted(tiny_run, place / "raw", "ldm", weights="raw")
    for folder, weights in ((averaged, "ema"), (raw, "raw")):
        found, expected = (
            load_any(p, w).denoiser.model.state_dict() for p, w in ((folder, "ema"), (tiny_run, weights))
        )
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert not torch.equal(picture(averaged), picture(raw))


@pytest.mark.parametrize("format", NAMES)
def test_an_autoencoder_alone_is_converted(place, sd1_folder, format):
    output = converted(sd1_folder / "vae", place / f"vae-{NAMES[format]}", format)
    parts = [load_any(p) for p in (sd1_folder / "vae", output)]
    assert parts[1].denoiser is None
    states = [p.autoencoder.state_dict() for p in parts]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v.nan_to_num(7.0), states[1][k].nan_to_num(7.0)) for k, v in states[0].items())
    with pytest.raises(ConfigError, match="is an autoencoder: nothing to sample from"):
        Pipeline.load(output)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_and_read(place, sources, dtype):
    output = converted(sources["diffusers"], place / f"{dtype}.safetensors", "compvis", dtype=dtype)
    assert {str(t.dtype) for t in load_file(output).values() if t.is_floating_point()} == {f"torch.{dtype}"}
    assert output.stat().st_size < 0.6 * (sources["compvis"].stat().st_size)
    difference = (picture(output) - picture(sources["diffusers"])).abs().mean()
    assert 0 < difference < (0.02 if dtype == "float16" else 0.1)


def test_what_a_converter_is_not_told_or_may_not_do(place, sources, tiny_run):
    source, new = sources["diffusers"], place / "never"
    (place / "a_file").write_text("x")
    for checkpoint, options, words in [
        (source, {"format": "onnx"}, "format=onnx is not known: choose one of ldm, diffusers, compvis"),
        (source, {"format": None}, r"needs format=, for example format=ldm\|diffusers\|compvis"),
        (source, {"output": None}, "needs output=, for example output=PATH"),
        (None, {}, "needs checkpoint="),
        (source, {"output": str(place / "a_file")}, "exists already: give another output="),
        (source, {"output": str(place / "a_file/x")}, "a_file/x: cannot be written"),
        (source, {"dtype": "int8"}, "dtype=int8 is not known: choose one of float32, float16, bfloat16"),
        (source, {"format": "ldm", "dtype": "float16"}, "dtype=float16: format=ldm stores float32"),
        (tiny_run, {"format": "compvis", "output": f"{new}.ckpt"}, r"a \.ckpt cannot say sizes or a schedule"),
        (tiny_run, {"format": "compvis"}, r"is a \.safetensors or a \.ckpt"),
        (source, {"weights": "best"}, "weights=best: choose ema or raw"),
        (source / "unet", {}, "unet has no autoencoder and no text encoder: it holds U-Net only. Give config="),
        (source / "text_encoder", {}, "text_encoder has no U-Net and no autoencoder: it holds text encoder only"),
    ]:
        settings = {"checkpoint": checkpoint and str(checkpoint), "output": str(new), "format": "diffusers", **options}
        with pytest.raises(ConfigError, match=words):
            Convert.run(OmegaConf.merge(task(), settings))
    assert not list(place.glob("never*"))


@pytest.mark.parametrize("said_by", ["config.yaml", "run", "checkpoint"])
def test_a_run_says_what_a_bare_file_of_its_model_does_not(place, sources, tiny_run, said_by):
    bare, whole = place / "bare.ckpt", place / "whole.safetensors"
    if not bare.exists():
        converted(tiny_run, whole, "compvis")
        torch.save({"state_dict": load_file(whole)}, bare)
    with pytest.raises(ConfigError, match="give config=DIR, a diffusers folder or a run of the same model"):
        load_any(bare)
    checkpoint = next(tiny_run.glob("checkpoints/step-*"))
    config = {"config.yaml": tiny_run / "config.yaml", "run": tiny_run, "checkpoint": checkpoint}[said_by]
    found, expected = load_any(bare, config=config), load_any(whole)
    assert found.scheduler_config == expected.scheduler_config
    for part in ("autoencoder", "text_encoder"):
        one, other = getattr(found, part).state_dict(), getattr(expected, part).state_dict()
        assert all(torch.equal(one[k].nan_to_num(7.0), other[k].nan_to_num(7.0)) for k in other), part
    drawn = [Pipeline.load(p, config=c).sample(PROMPT, num_steps=2, seed=1) for p, c in ((bare, config), (whole, None))]
    assert torch.equal(*drawn)


def test_a_run_of_a_model_that_single_files_do_not_hold_is_refused(place, tiny_run):
    nodes = OmegaConf.load(tiny_run / "config.yaml")
    file = place / "bare.ckpt"
    if not file.exists():
        torch.save({"state_dict": load_file(converted(tiny_run, place / "again.safetensors", "compvis"))}, file)
    for change, words in (
        ({"model": {"_target_": "ldm.models.dit.DiT"}}, "model=ldm.models.dit.DiT: single files hold UNet only"),
        ({"scheduler": {"_target_": "ldm.diffusion.schedulers.Flow"}}, "scheduler or target that single files cannot"),
        ({"autoencoder": None}, "has no autoencoder"),
    ):
        OmegaConf.save(OmegaConf.merge(nodes, change), place / "other.yaml")
        with pytest.raises(ConfigError, match=words):
            load_any(file, config=place / "other.yaml")
