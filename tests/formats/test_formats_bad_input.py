"""What is no checkpoint, is damaged, would run code, or cannot be carried: one line says so, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import ConfigError
from ldm.formats.checkpoint import Stored, kind, read, write
from ldm.formats.diffusers.folder import describe
from ldm.formats.files.open import load
from ldm.formats.single import file as single_file
from ldm.formats.single.metadata import CONFIG

ONE = torch.ones(2, 2)
NOT_CHECKPOINTS = [
    (
        {"lora_unet_mid_block_attentions_0.lora_down.weight": ONE, "lora_te_x.alpha": ONE},
        "lora",
        "a LoRA: it is an adapter",
    ),
    ({"unet.mid_block.attentions.0.to_q.lora_A.weight": ONE}, "lora", "a LoRA"),
    ({"mid_block.attn1.processor.to_q_lora.down.weight": ONE}, "lora", "a LoRA"),
    ({"lora_unet_x.hada_w1_a": ONE}, "lora", "a LoRA"),
    (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": ONE}},
        "textual_inversion",
        "an embedding: it is an adapter",
    ),
    ({"emb_params": ONE}, "textual_inversion", "an embedding"),
    ({"<cat-toy>": ONE}, "textual_inversion", "an embedding"),
    (
        {320: ({"linear.0.weight": ONE}, {}), 640: ({}, {}), "step": 7},
        "hypernetwork",
        "a hypernetwork: it is an adapter",
    ),
    (
        {"control_model.input_blocks.0.0.weight": ONE, "model.diffusion_model.out.2.weight": ONE},
        "other",
        "a ControlNet",
    ),
    ({"conditioner.embedders.0.x": ONE, "model.diffusion_model.out.2.weight": ONE}, "other", "Stable Diffusion XL"),
    ({"model.diffusion_model.joint_blocks.0.x_block.y": ONE}, "other", "Stable Diffusion 3"),
    ({"down_blocks.0.resnets.0.conv1.weight": ONE}, "other", "a U-Net's weights alone.*give the folder"),
    ({"text_model.embeddings.token_embedding.weight": ONE}, "other", "a text encoder's weights alone.*give the folder"),
    ({"banana": ONE}, "other", "of no known kind: its entries are called banana"),
]


@pytest.mark.parametrize(("content", "name", "sentence"), NOT_CHECKPOINTS, ids=lambda x: str(x)[:20])
def test_other_files_are_called_what_they_are(tmp_path, content, name, sentence):
    torch.save(content, tmp_path / "x.ckpt")
    assert kind(tmp_path / "x.ckpt") == name
    with pytest.raises(ConfigError, match=f"x.ckpt is .*{sentence}"):
        read(tmp_path / "x.ckpt")


def test_a_file_that_asks_for_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for legacy in (False, True):
        content = {"state_dict": {"model.diffusion_model.out.2.weight": ONE}, "callbacks": Evil()}
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ConfigError, match=r"asks for posix\.mkdir, which is code: it was not run"):
            read(tmp_path / "x.ckpt")
    assert not (tmp_path / "owned").exists()


def test_what_published_files_mention_is_let_through_as_nothing(tmp_path, sd1_folder, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    checkpoint = read(sd1_folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        score = numpy.float64(0.5)
        callbacks = {module.ModelCheckpoint: {"best": score, "all": numpy.arange(3), "last": module.ModelCheckpoint()}}
        content = {"state_dict": single_file.to_compvis(checkpoint), "global_step": 470000, "callbacks": callbacks}
        torch.save(content, tmp_path / "x.ckpt")
    found = read(tmp_path / "x.ckpt", config=sd1_folder)
    assert all(torch.equal(v, found.states["unet"][k]) for k, v in checkpoint.states["unet"].items())


def cut(path, share: float):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "old.ckpt"])
def test_files_cut_short_are_named(tmp_path, suffix, share):
    tensors, path = {f"model.diffusion_model.{i}": torch.randn(50, 50) for i in range(30)}, tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == "ckpt")
    cut(path, share)
    with pytest.raises(ConfigError, match=rf"x\.{suffix}.*(cut short|is empty|damaged|neither).*(again|folder)"):
        read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "holds text, not tensors.*Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "holds text"),
        (bytes(range(128, 256)), "was cut short|damaged|neither"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, sentence):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path / "x.safetensors")


def test_paths_that_are_no_checkpoint(tmp_path, sd1_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path, sentence in [
        (tmp_path, r"is no checkpoint: it has no model_index\.json"),
        (tmp_path / "no.safetensors", "there is nothing at this path"),
        ("nobody/nothing", r"nobody/nothing is not a folder here, and cannot be fetched from the hub"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            read(path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a run of ldm's own"):
        read(tmp_path / "run")
    with pytest.raises(ConfigError, match="weights=best is not known"):
        read(sd1_folder, weights="best")


@pytest.fixture
def copy(tmp_path, sd1_folder):
    """A pipeline's folder that may be damaged."""
    return shutil.copytree(sd1_folder, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_of_another_architecture_or_incomplete(copy):
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(weights).items()}
    for break_it, sentence in [
        (
            lambda: edit(copy / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
            "with text_encoder_2: ldm",
        ),
        (lambda: edit(copy / "model_index.json", vae=["diffusers", "VQModel"]), "with vae=VQModel: ldm reads"),
        (lambda: edit(copy / "unet/config.json", class_embed_type="timestep"), "says class_embed_type=timestep"),
        (lambda: edit(copy / "unet/config.json", attention_head_dim=[8, 4, 2, 1]), "says attention_head_dim"),
        (lambda: edit(copy / "unet/config.json", down_block_types=["AttnDownBlock2D"] * 4), "says down_block_types"),
        (lambda: (copy / "vae/config.json").write_text('{"a": '), r"vae.config\.json is not JSON"),
        (lambda: (copy / "vae/config.json").unlink(), r"vae.config\.json is missing"),
        (weights.unlink, "unet holds no weights"),
        (
            lambda: save_file({k: v for k, v in tensors.items() if "mid" not in k}, weights),
            r"unet does not fit.*\d+ tensors missing",
        ),
        (
            lambda: save_file(tensors | {name: ONE.clone() for name in "abcd"}, weights),
            r"0 tensors missing, 4 unknown, 0 of another shape \(first: a, b, c\)",
        ),
        (
            lambda: save_file(tensors | {"conv_in.bias": ONE}, weights),
            r"first: conv_in.bias is \(2, 2\) instead of \(32,\)",
        ),
    ]:
        backup = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
        break_it()
        with pytest.raises(ConfigError, match=sentence):
            read(copy)
        for path, content in backup.items():
            path.write_bytes(content)
    read(copy)


def test_single_files_that_do_not_say_enough_or_fit_nothing(tmp_path, sd1_folder, sd2_folder):
    tensors, path = single_file.to_compvis(read(sd1_folder)), tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"block_channels=\[32, 64, 64, 64\].*no published ones.*give config=DIR"):
        read(path)
    with pytest.raises(ConfigError, match=r"config=.* is no diffusers folder and no run of ours"):
        read(path, config=path)
    save_file(tensors | {"strange.key": ONE}, path)
    with pytest.raises(ConfigError, match=r"1 unknown.*first: strange.key"):
        read(path, config=sd1_folder)
    save_file(tensors | {"model.diffusion_model.label_emb.0.0.weight": ONE}, path)
    with pytest.raises(ConfigError, match="is Stable Diffusion XL, or another model that reads a vector"):
        read(path, config=sd1_folder)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"model.linear_projection=False, but config= says True"):
        read(path, config=sd2_folder)
    save_file({k: v for k, v in tensors.items() if "diffusion" not in k}, path)
    with pytest.raises(ConfigError, match="has CLIP's text encoder, but config= is of a model with the other"):
        single_file.read(load(path), path, describe(sd2_folder), "raw")
    torn = tensors | {"model.diffusion_model.out.2.weight": ONE}
    save_file(torn, path)
    with pytest.raises(ConfigError, match=r"U-Net lacks out\.2\.weight, or has it in another shape"):
        read(path, config=sd1_folder)
    config = shutil.copytree(sd1_folder, tmp_path / "other")
    edit(config / "unet/config.json", block_out_channels=[32, 64, 64, 128])
    save_file(tensors, path)
    with pytest.raises(
        ConfigError, match=r"model.block_channels=\[32, 64, 64, 64\], but config= says \[32, 64, 64, 128\]"
    ):
        read(path, config=config)


def test_metadata_name_no_code(tmp_path, sd1_folder):
    checkpoint, path = read(sd1_folder), tmp_path / "x.safetensors"
    tensors = single_file.to_compvis(checkpoint)
    evil = json.dumps(checkpoint.config | {"model": {"_target_": "os.system", "command": "true"}})
    save_file(tensors, path, metadata={CONFIG: evil, "ldm.scaling_factor": "1"})
    with pytest.raises(ConfigError, match=r"metadata name .*os.system"):
        read(path)
    save_file(tensors, path, metadata={CONFIG: "{"})
    with pytest.raises(ConfigError, match=r"its ldm\.config is not JSON"):
        read(path)


def test_what_a_format_cannot_carry_is_refused_before_anything_is_written(tmp_path, sd1_folder):
    whole = read(sd1_folder)

    def without(part: str, key: str) -> Stored:
        config, states = ({k: v for k, v in d.items() if k not in (part, key)} for d in (whole.config, whole.states))
        return replace(whole, config=config, states=states)

    dit = replace(whole, config=whole.config | {"model": {"_target_": "ldm.models.dit.DiT"}})
    shallow = whole.config["text_encoder"] | {"activation": "relu"}
    for checkpoint, output, format, sentence in [
        (dit, "x", "diffusers", "format=diffusers cannot carry model=ldm.models.dit.DiT.*Use format=ldm"),
        (without("text_encoder", "text_encoder"), "x", "diffusers", "has no text_encoder .*Use format=ldm"),
        (without("unet", "model"), "x.safetensors", "compvis", "has no unet .*Use format=ldm"),
        (replace(whole, scheduler_config=None), "x", "diffusers", "schedule or target. Use format=ldm"),
        (replace(whole, tokenizer=None), "x", "diffusers", "needs a tokenizer.*config=DIR"),
        (
            replace(whole, config=whole.config | {"text_encoder": shallow}),
            "x.ckpt",
            "compvis",
            "activation=relu.*format=diffusers",
        ),
        (whole, "x.ckpt", "compvis", r"a \.ckpt cannot say sizes.*\.safetensors, or format=diffusers"),
        (whole, "x.bin", "compvis", r"is a \.safetensors or a \.ckpt"),
        (whole, "x", "onnx", "format=onnx is not written here"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            write(checkpoint, tmp_path / output, format)
    with pytest.raises(ConfigError, match="dtype=int8 is not known"):
        write(whole, tmp_path / "x", "diffusers", "int8")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match=r"x exists already: give another output="):
        write(whole, tmp_path / "x", "diffusers")
