"""Other programs' checkpoints: every layout in and out bit for bit, and diffusers draws the same from what we write."""

from __future__ import annotations

import json
from contextlib import nullcontext

import diffusers
import huggingface_hub
import published as published_models
import pytest
import torch
from format_checks import NODES, PROMPTS, aligned, assert_same, conf, filled, hub_copy, same
from safetensors.torch import load_file, save_file

from ldm.build import build
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.formats import published
from ldm.formats.checkpoint import Stored, kind, read, write
from ldm.formats.single import file as single_file
from ldm.text.tokenizer import build_tokenizer, load_tokenizer

MODELS = ["sd1", "sd2", pytest.param("sd1_inpaint", marks=pytest.mark.slow)]


@pytest.fixture(params=MODELS)
def folder(request):
    """Each published pipeline's folder in turn."""
    return request.getfixturevalue(f"{request.param}_folder")


def test_our_modules_give_diffusers_outputs(folder):
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    ours = filled(read(folder))
    generator = torch.Generator().manual_seed(0)
    channels = theirs.unet.config.in_channels
    x_t, context = (torch.randn(s, generator=generator) for s in ((2, channels, 8, 8), (2, 5, 32)))
    images, t = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1, torch.tensor([999.0, 20.5])
    close = dict(atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = theirs.unet(x_t, t, context).sample
        torch.testing.assert_close(ours["unet"](x_t, t, Condition(context=context)), expected, **close)
        posterior, latent = ours["vae"].encode(images), theirs.vae.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, latent.mean, **close)
        torch.testing.assert_close(posterior.logvar, latent.logvar, **close)
        torch.testing.assert_close(ours["vae"].decode(latent.mean), theirs.vae.decode(latent.mean).sample, **close)
        torch.testing.assert_close(ours["vae"].latents.standardise(latent.mean), 0.18215 * latent.mean, **close)
        ids = theirs.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(ours["text_encoder"].tokenize(PROMPTS), ids)
        expected = theirs.text_encoder(ids)[0]
        torch.testing.assert_close(ours["text_encoder"].encode(PROMPTS).context, expected, **close)


def test_every_layout_gives_back_every_bit(folder, tmp_path):
    first = read(folder)
    write(first, tmp_path / "one.safetensors", "compvis")
    one = read(tmp_path / "one.safetensors")  # needs no config: its metadata say it
    write(one, tmp_path / "folder", "diffusers")
    again = read(tmp_path / "folder")
    write(again, tmp_path / "two.safetensors", "compvis")
    for other in (one, again, read(tmp_path / "two.safetensors"), read(tmp_path / "one.safetensors", config=folder)):
        assert_same(first, other)
    assert [kind(tmp_path / n) for n in ("one.safetensors", "folder")] == ["compvis", "diffusers"]
    names = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert names <= {p.name for p in (tmp_path / "folder/tokenizer").iterdir()}
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_diffusers_draws_the_same_from_what_is_written(folder, tmp_path):
    checkpoint = read(folder)
    write(checkpoint, tmp_path / "folder", "diffusers")
    write(checkpoint, tmp_path / "one.safetensors", "compvis")
    reference = aligned(diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None))
    single = type(reference).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(folder), local_files_only=True, safety_checker=None
    )
    options = {}
    if reference.unet.config.in_channels == 9:
        generator = torch.Generator().manual_seed(3)
        mask = (torch.rand(1, 1, 64, 64, generator=generator) > 0.5).float()
        options = dict(image=torch.rand(1, 3, 64, 64, generator=generator), mask_image=mask)
    picture = published_models.draw(reference, negative_prompt="sea", **options)
    assert picture.std() > 0.1
    for other in (diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder"), single):
        assert type(other) is type(reference)
        for part in NODES:
            assert same(getattr(reference, part).state_dict(), getattr(other, part).state_dict()), part
        assert torch.equal(published_models.draw(aligned(other), negative_prompt="sea", **options), picture)


def test_a_model_trained_here_leaves_and_comes_back(tmp_path):
    """Nodes as conf/ has them, defaults not spelled; two levels, standardised latents, a small text encoder."""
    torch.manual_seed(0)
    nodes = {"model": conf("model", "unet_tiny"), "autoencoder": conf("autoencoder", "kl_tiny")}
    nodes |= {"text_encoder": conf("text_encoder", "small_tiny") | {"vocab_size": 600, "max_length": 16}}
    modules = {part: build(nodes[key], key).eval() for part, key in NODES.items()}
    modules["vae"].latents.set(torch.tensor([0.5, -2.0, 0.0, 1.0]), torch.tensor([0.5, 3.0, 1.0, 8.0]))
    published_models.randomise(modules["unet"], 0)
    words = build_tokenizer(["a red cat"], 600)
    modules["text_encoder"].set_tokenizer(words)
    modules["text_encoder"].save_tokenizer(tmp_path / "words")
    states = {part: module.state_dict() for part, module in modules.items()}
    schedule = published.scheduler_config("v_prediction") | {"beta_schedule": "linear"}
    checkpoint = Stored(nodes | {"image_size": 32}, states, schedule, tmp_path / "words")
    write(checkpoint, tmp_path / "folder", "diffusers")
    write(checkpoint, tmp_path / "one.safetensors", "compvis")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    single = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), local_files_only=True, safety_checker=None
    )
    for part in NODES:
        assert same(getattr(theirs, part).state_dict(), getattr(single, part).state_dict())
    assert theirs.scheduler.config.beta_schedule == "linear" and theirs.vae.config.scaling_factor == 0.18215
    x0, context, t = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 64), torch.tensor([17.0])
    ids = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    again = read(tmp_path / "folder"), read(tmp_path / "one.safetensors")
    with torch.no_grad():
        picture = modules["vae"].decode(modules["vae"].latents.restore(x0))
        torch.testing.assert_close(theirs.vae.decode(x0 / 0.18215).sample, picture, atol=1e-5, rtol=1e-5)
        expected = modules["unet"](x0, t, Condition(context=context))
        torch.testing.assert_close(theirs.unet(x0, t, context).sample, expected, atol=1e-5, rtol=1e-5)
        expected = modules["text_encoder"].encode(PROMPTS).context
        torch.testing.assert_close(theirs.text_encoder(ids)[0], expected, atol=1e-5, rtol=1e-5)
        for other in map(filled, again):
            back = other["vae"].decode(other["vae"].latents.restore(x0))
            torch.testing.assert_close(back, picture, atol=1e-5, rtol=1e-5)
            assert torch.equal(other["text_encoder"].encode(PROMPTS).context, expected)
    assert again[1].config["text_encoder"]["_target_"] == "ldm.text.small.SmallTextEncoder"  # the metadata know
    assert [c.scheduler_config for c in again] == [schedule, schedule]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_ckpt_of_published_sizes_says_enough(name, request, tmp_path, small_is_published, monkeypatch):
    folder = request.getfixturevalue(f"{name}_folder")
    first = read(folder)
    if name == "sd1":
        monkeypatch.setitem(
            published.UNETS, ((32, 64, 64, 64), 32), {"head_dim": None, "num_heads": 8, "norm_groups": 8}
        )
    write(first, tmp_path / "one.ckpt", "compvis")
    assert set(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]) == set(single_file.to_compvis(first))
    with pytest.warns(UserWarning, match="predicts") if name == "sd2" else nullcontext():
        alone = read(tmp_path / "one.ckpt")
    assert alone.scheduler_config["prediction_type"] == ("v_prediction" if name == "sd2" else "epsilon")
    assert alone.config["text_encoder"]["pad"] == ("!" if name == "sd2" else None)
    assert all(same(first.states[p], alone.states[p]) for p in NODES)
    assert_same(first, read(tmp_path / "one.ckpt", config=folder))
    unet = diffusers.UNet2DConditionModel.from_single_file(
        str(tmp_path / "one.ckpt"), config=str(folder), subfolder="unet", local_files_only=True
    )
    assert same(first.states["unet"], unet.state_dict())


def test_a_ckpt_of_stable_diffusion_2_is_told_apart_by_its_steps(tmp_path, small_is_published, sd2_folder):
    base = read(sd2_folder)
    base.scheduler_config = published.scheduler_config("epsilon")
    write(base, tmp_path / "base.ckpt", "compvis")
    with pytest.warns(UserWarning, match="epsilon is taken, because its global_step is 875000"):
        assert read(tmp_path / "base.ckpt").scheduler_config["prediction_type"] == "epsilon"
    tensors = single_file.to_compvis(base)
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.warns(UserWarning, match="v_prediction is taken, because its global_step is None"):
        found = read(tmp_path / "v.safetensors")
    assert found.scheduler_config["_class_name"] == "DDIMScheduler" and found.config["image_size"] == 768
    save_file(tensors, tmp_path / "said.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    assert read(tmp_path / "said.safetensors").scheduler_config["prediction_type"] == "epsilon"


def test_a_published_single_file_reads_captions_with_clips_published_words(
    tmp_path, small_is_published, sd2_folder, monkeypatch
):
    monkeypatch.setattr(published, "VOCABULARY", 629)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    save_file(single_file.to_compvis(read(sd2_folder)), tmp_path / "x.safetensors", {"modelspec.prediction_type": "v"})
    with pytest.warns(UserWarning, match="has no tokenizer: tokenizer=openai/clip-vit-large-patch14 is not a folder"):
        assert read(tmp_path / "x.safetensors").tokenizer is None
    hub_copy(tmp_path, "openai/clip-vit-large-patch14", sd2_folder / "tokenizer")
    found = read(tmp_path / "x.safetensors")
    assert found.scheduler_config["prediction_type"] == "v_prediction"
    expected = filled(read(sd2_folder))["text_encoder"].tokenize(PROMPTS)
    assert torch.equal(filled(found)["text_encoder"].tokenize(PROMPTS), expected)


@pytest.mark.slow
def test_published_files_of_full_size_are_known_by_their_shapes(tmp_path):
    """Stable Diffusion 1, its inpainting, and 2, of meta tensors: the nodes are those of conf/, 686 + 248 tensors."""

    for unet, text, channels, prediction in [
        ("unet_sd15", "clip_l", 4, "epsilon"),
        ("unet_sd15", "clip_l", 9, "epsilon"),
        ("unet_sd21", "openclip_h", 4, "v_prediction"),
    ]:
        config = {"model": conf("model", unet) | {"in_channels": channels}, "autoencoder": conf("autoencoder", "kl_f8")}
        config |= {"text_encoder": conf("text_encoder", text)}
        states = {part: single_file.expected(config[key]) for part, key in NODES.items()}
        states["vae"] |= {"latents.mean": torch.zeros(4), "latents.scale": torch.full((4,), 1 / 0.18215)}
        checkpoint = Stored(config, states, published.scheduler_config(prediction))
        tensors = single_file.to_compvis(checkpoint)
        assert sum(k.startswith("model.diffusion_model.") for k in tensors) == 686
        assert sum(k.startswith("first_stage_model.") for k in tensors) == 248
        assert single_file.found_again(checkpoint, tensors, None)
        checkpoint.scheduler_config["beta_schedule"] = "linear"
        assert not single_file.found_again(checkpoint, tensors, None)


def test_averages_are_taken_on_request_and_whole(tmp_path, sd1_folder):
    checkpoint = read(sd1_folder)
    tensors = single_file.to_compvis(checkpoint)
    unet = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    averages = {"model_ema." + k.removeprefix("model.").replace(".", ""): 2 * v for k, v in unet.items()}
    rest = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7), "betas": torch.ones(9)}
    torch.save({"state_dict": {"state_dict": tensors | averages | rest}}, tmp_path / "both.ckpt")
    raw, average = (read(tmp_path / "both.ckpt", config=sd1_folder, weights=w) for w in ("raw", "ema"))
    assert_same(checkpoint, raw)
    assert same({k: 2 * v for k, v in raw.states["unet"].items()}, average.states["unet"])
    del averages["model_ema.diffusion_modelout2weight"]
    torch.save({"state_dict": tensors | averages}, tmp_path / "torn.ckpt")
    with pytest.raises(ConfigError, match=r"averaged U-Net.*1 tensors missing.*out.2.weight"):
        read(tmp_path / "torn.ckpt", config=sd1_folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["half", "half.safetensors"])
def test_half_precision_files_are_read_as_float32(tmp_path, sd1_folder, dtype, name):
    checkpoint = read(sd1_folder)
    write(checkpoint, tmp_path / name, "compvis" if "." in name else "diffusers", dtype)
    half = read(tmp_path / name)
    kind = getattr(torch, dtype)
    for part, state in checkpoint.states.items():
        kept = {k: v if k.startswith("latents.") else v.to(kind).float() for k, v in state.items()}
        assert same(kept, half.states[part])


@pytest.mark.parametrize("layout", ["fp16", "bin", "shards", "non_ema"])
def test_every_kind_of_weights_file_in_a_folder_is_read(tmp_path, sd1_folder, layout):
    first = read(sd1_folder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder, safety_checker=None)
    if layout == "fp16":
        pipeline.to(torch.float16).save_pretrained(tmp_path / "x", variant="fp16")
        first.states["unet"] = {k: v.half().float() for k, v in first.states["unet"].items()}
    elif layout == "bin":
        pipeline.save_pretrained(tmp_path / "x", safe_serialization=False)
    else:
        pipeline.save_pretrained(tmp_path / "x", max_shard_size="2MB" if layout == "shards" else None)
    file = tmp_path / "x/unet/diffusion_pytorch_model.safetensors"
    if layout == "non_ema":
        save_file({k: -v for k, v in load_file(file).items()}, file.with_stem(file.stem + ".non_ema"))
        raw = read(tmp_path / "x", weights="raw").states["unet"]
        assert same({k: -v for k, v in first.states["unet"].items()}, raw)
    if layout == "shards":
        assert len(list(file.parent.glob("*-of-*"))) > 3
    assert same(first.states["unet"], read(tmp_path / "x").states["unet"])


def test_a_hub_id_is_read_from_its_cache_and_a_part_from_its_own_folder(tmp_path, sd1_folder, monkeypatch):
    hub_copy(tmp_path, "somebody/small", sd1_folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    first = read(sd1_folder)
    assert kind("somebody/small") == "diffusers"
    assert_same(first, read("somebody/small"))
    for part in NODES:
        assert kind(sd1_folder / part) == part
        found = read(sd1_folder / part)
        assert found.config == {NODES[part]: first.config[NODES[part]]}
        assert same(first.states[part], found.states[part])


def test_the_padding_that_a_node_names_leaves_with_the_tokenizer(tmp_path, sd1_folder):
    checkpoint = read(sd1_folder)
    checkpoint.config["text_encoder"]["pad"] = "!"
    write(checkpoint, tmp_path / "folder", "diffusers")
    assert load_tokenizer(tmp_path / "folder/tokenizer").pad_token_id == 0
    assert json.loads((tmp_path / "folder/text_encoder/config.json").read_text())["pad_token_id"] == 0
    again = read(tmp_path / "folder")
    for one in (checkpoint, again):
        assert filled(one)["text_encoder"].tokenize(["a"])[0, -1] == 0


def test_both_spellings_of_the_text_encoder_are_read(tmp_path, sd1_folder):
    first = read(sd1_folder)
    tensors = single_file.to_compvis(first)
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in tensors
    start = "cond_stage_model.transformer."
    short = {k.replace(f"{start}text_model.", start): v for k, v in tensors.items()}
    short[f"{start}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(short, tmp_path / "short.safetensors")
    assert_same(first, read(tmp_path / "short.safetensors", config=sd1_folder))


def test_a_published_openclip_has_a_last_layer_that_is_not_read(tmp_path, sd2_folder):
    first = read(sd2_folder)
    tensors, start = single_file.to_compvis(first), "cond_stage_model.model."
    last = {k.replace(".22.", ".23."): 9 * v for k, v in tensors.items() if f"{start}transformer.resblocks.22." in k}
    more = {f"{start}text_projection": torch.ones(32, 32), f"{start}logit_scale": torch.ones(())}
    save_file(tensors | last | more, tmp_path / "x.safetensors")
    assert len(last) == 12
    assert_same(first, read(tmp_path / "x.safetensors", config=sd2_folder))
