"""Single files as people share them: parts missing, averages alone, wrappers before the names, entries nobody reads."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.checkpoints.load import open_any
from ldm.checkpoints.stages import to_native
from ldm.errors import ConfigError
from ldm.formats.checkpoint import kind, read, write
from ldm.formats.keys import unet as unet_keys
from ldm.formats.keys.plain_names import plain_names

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PARTS = {UNET: ("unet", "U-Net"), VAE: ("vae", "autoencoder"), TEXT: ("text_encoder", "text encoder")}


@pytest.fixture(scope="module")
def theirs(sd1_folder):
    return read(sd1_folder)


@pytest.fixture(scope="module")
def whole(theirs, tmp_path_factory) -> dict[str, torch.Tensor]:
    file = tmp_path_factory.mktemp("single") / "whole.safetensors"
    write(theirs, file, "compvis")
    return load_file(file)


def without(whole, *prefixes: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in whole.items() if not k.startswith(prefixes)}


def only(whole, *prefixes: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in whole.items() if k.startswith(prefixes)}


def averages(whole, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The U-Net as CompVis' trainer keeps its averages."""
    found = {"model_ema." + k.removeprefix("model.").replace(".", ""): factor * v for k, v in only(whole, UNET).items()}
    return found | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def assert_same_states(found, theirs, factor: float = 1.0):
    assert found.keys() == theirs.keys()
    for part, state in theirs.items():
        assert found[part].keys() == state.keys()
        for name, tensor in state.items():
            wanted = factor * tensor if part == "unet" else tensor
            assert torch.equal(found[part][name], wanted) or name.startswith("latents."), f"{part}.{name}"


# What is taken away, as the files that are shared are without it.


@pytest.mark.parametrize("gone", [(TEXT,), (VAE,), (UNET,), (TEXT, VAE), (UNET, TEXT), (UNET, VAE)], ids="+".join)
def test_missing_parts_come_from_config_or_are_named(whole, theirs, sd1_folder, tmp_path, gone):
    save_file(without(whole, *gone), tmp_path / "part.safetensors")
    if gone == (UNET, TEXT):  # an autoencoder's file
        assert kind(tmp_path / "part.safetensors") == "vae"
        with pytest.raises(ConfigError, match="is an autoencoder: nothing to sample from"):
            Pipeline.load(tmp_path / "part.safetensors", config=sd1_folder)
        return
    found = open_any(tmp_path / "part.safetensors", config=sd1_folder)
    assert_same_states(found.states, theirs.states)
    assert found.tokenizer is not None and found.scheduler_config == theirs.scheduler_config
    changed = [1.5 * v if v.is_floating_point() else v for v in whole.values()]
    save_file(without(dict(zip(whole, changed, strict=True)), *gone), tmp_path / "changed.safetensors")
    found = open_any(tmp_path / "changed.safetensors", config=sd1_folder)
    for prefix, (part, _) in PARTS.items():  # what the file has is the file's
        name = next(k for k in theirs.states[part] if k.endswith(".weight"))
        same = torch.equal(found.states[part][name], theirs.states[part][name])
        assert same == (prefix in gone), part


@pytest.mark.parametrize("gone", [(TEXT,), (VAE,), (UNET,)], ids="+".join)
def test_what_is_missing_is_said_in_one_line(whole, tmp_path, small_is_published, gone):
    save_file(without(whole, *gone), tmp_path / "part.safetensors")
    [(_, called)] = [PARTS[prefix] for prefix in gone]
    with pytest.raises(
        ConfigError, match=f"part.safetensors has no {called}: it holds .* only. Give config=PATH"
    ) as no:
        Pipeline.load(tmp_path / "part.safetensors")
    assert "\n" not in str(no.value)


def test_the_part_may_come_from_a_run_of_ours(whole, sd1_folder, theirs, tmp_path):
    save_file(without(whole, TEXT), tmp_path / "part.safetensors")
    Pipeline.load(sd1_folder).save(tmp_path / "ours")
    for config in (tmp_path / "ours", tmp_path / "ours/config.yaml"):
        found = open_any(tmp_path / "part.safetensors", config=config).states["text_encoder"]
        assert all(torch.equal(found[k], v) for k, v in theirs.states["text_encoder"].items())


def test_config_may_lack_the_part_too(whole, sd1_folder, tmp_path, small_is_published):
    save_file(without(whole, TEXT), tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"has no text encoder, and config=.*unet has none either: it holds"):
        open_any(tmp_path / "part.safetensors", config=sd1_folder / "unet")
    shutil.copytree(sd1_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="holds no weights"):
        open_any(tmp_path / "part.safetensors", config=tmp_path / "bare")


def test_what_a_stage_keeps_is_told_apart_by_where_parts_come_from(whole, sd1_folder, tmp_path):
    """evaluate and training convert such a file once: of another text encoder in config= it is another model."""
    save_file(without(whole, TEXT), tmp_path / "part.safetensors")
    other = shutil.copytree(sd1_folder, tmp_path / "config")
    asked = {"checkpoint": tmp_path / "part.safetensors", "weights": "ema", "config": other, "outputs": tmp_path}
    first = to_native(asked)
    assert to_native(asked) == first
    place = other / "text_encoder/model.safetensors"
    save_file({k: 2 * v for k, v in load_file(place).items()}, place)
    assert to_native(asked) != first


def test_a_u_net_alone_without_any_prefix(whole, theirs, sd1_folder, tmp_path):
    """As trainers save what they trained: CompVis' names from the U-Net's own root, or one level above."""
    for prefix in ("", "diffusion_model."):
        bare = {prefix + k.removeprefix(UNET): v for k, v in only(whole, UNET).items()}
        save_file(bare, tmp_path / "unet.safetensors")
        assert kind(tmp_path / "unet.safetensors") == "compvis"
        assert_same_states(open_any(tmp_path / "unet.safetensors", config=sd1_folder).states, theirs.states)


# Averages.


def test_averages_alone_are_read_as_averages(whole, theirs, sd1_folder, tmp_path):
    save_file(without(whole, UNET) | averages(whole, 0.5), tmp_path / "x.safetensors")
    assert_same_states(open_any(tmp_path / "x.safetensors", config=sd1_folder).states, theirs.states, 0.5)
    with pytest.raises(ConfigError, match=r"averages alone .*weights=raw asks for the plain.*use weights=ema"):
        open_any(tmp_path / "x.safetensors", "raw", sd1_folder)
    save_file(whole | averages(whole, 0.5), tmp_path / "both.safetensors")
    for weights, factor in (("ema", 0.5), ("raw", 1.0)):
        assert_same_states(open_any(tmp_path / "both.safetensors", weights, sd1_folder).states, theirs.states, factor)
    dotted = {"model_ema." + k.removeprefix("model."): v for k, v in only(whole, UNET).items()}
    save_file(without(whole, UNET) | dotted, tmp_path / "dotted.safetensors")
    assert_same_states(open_any(tmp_path / "dotted.safetensors", config=sd1_folder).states, theirs.states)


def ema_name(theirs):
    """Where CompVis' trainer keeps the average of a tensor of its U-Net."""
    return "model_ema." + ("diffusion_model." + theirs).replace(".", "")


@pytest.mark.parametrize("folder", ["sd1", "sd2", "sd1_inpaint"])
def test_names_that_lost_their_dots_get_them_back(request, folder):
    names = unet_keys.compvis_names(read(request.getfixturevalue(f"{folder}_folder")).states["unet"]).values()
    leaves = "in_layers.0.weight transformer_blocks.10.attn2.to_out.0.bias transformer_blocks.0.ff.net.0.proj.weight"
    leaves += " transformer_blocks.3.ff.net.2.bias op.weight conv.bias skip_connection.weight proj_in.weight"
    places = [f"{side}put_blocks.{i}.{j}" for side in ("in", "out") for i in (9, 10, 11) for j in (0, 1)]
    wide = [f"{place}.{leaf}" for place in places for leaf in leaves.split()]
    tensors = {ema_name(name): torch.zeros(1) for name in [*names, *wide]}
    assert set(unet_keys.from_averages(tensors)) == {*names, *wide}


# Wrappers before the names.

WRAPPED = {
    "ddp": lambda k: f"module.{k}",
    "compile": lambda k: f"_orig_mod.{k}",
    "both": lambda k: f"_orig_mod.module.{k}",
    "both, the other way round": lambda k: f"module._orig_mod.{k}",
    "compiled U-Net": lambda k: k.replace(UNET, "model.diffusion_model._orig_mod."),
    "compiled wrapper": lambda k: k.replace(UNET, "model._orig_mod.diffusion_model."),
    "compiled parts": lambda k: k.replace(VAE, f"{VAE}_orig_mod.").replace(TEXT, f"{TEXT}module."),
    "fsdp": lambda k: k.replace("middle_block.", "_fsdp_wrapped_module.middle_block._fsdp_wrapped_module."),
    "doubled": lambda k: f"model.{k}",
    "only the U-Net doubled": lambda k: k.replace("model.diffusion_model.", "model.model.diffusion_model."),
    "an attribute of two levels": lambda k: f"pl_module.ldm.{k}",
    "everything": lambda k: f"state_dict.module._orig_mod.model.{k}",
}


@pytest.mark.parametrize("way", WRAPPED)
def test_wrappers_before_the_names_are_passed_over(whole, theirs, sd1_folder, tmp_path, way):
    averaged = {"compiled U-Net": lambda k: k.replace("diffusion_model", "diffusion_model_orig_mod", 1)}
    wrap = WRAPPED[way]
    state = {wrap(k): v for k, v in whole.items()} | {
        wrap("betas"): torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    }
    state |= {averaged.get(way, wrap)(k): v for k, v in averages(whole, 0.5).items()}
    save_file(state, tmp_path / "x.safetensors")
    assert kind(tmp_path / "x.safetensors") == "compvis"
    for weights, factor in (("ema", 0.5), ("raw", 1.0)):
        assert_same_states(open_any(tmp_path / "x.safetensors", weights, sd1_folder).states, theirs.states, factor)


NESTED = {
    "state_dict": lambda s: {"state_dict": s, "global_step": 3},
    "twice": lambda s: {"state_dict": {"state_dict": s}},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
    "module of a state_dict": lambda s: {"state_dict": {"module": {f"module.{k}": v for k, v in s.items()}}},
    "model_state_dict": lambda s: {"model_state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("way", NESTED)
def test_nested_torch_files_are_read(whole, theirs, sd1_folder, tmp_path, way):
    torch.save(NESTED[way](without(whole, TEXT)), tmp_path / "x.ckpt")
    assert_same_states(open_any(tmp_path / "x.ckpt", config=sd1_folder).states, theirs.states)


def test_a_name_that_stands_twice_is_refused(whole, sd1_folder, tmp_path):
    name = next(k for k in whole if k.startswith(UNET))
    save_file(whole | {f"module.{name}": torch.zeros_like(whole[name])}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=f"x.safetensors has {name} twice"):
        open_any(tmp_path / "x.safetensors", config=sd1_folder)


def test_other_files_keep_their_names():
    names = [
        "lora_unet_x.lora_down.weight",
        "encoder.conv_in.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "out.x",
    ]
    assert plain_names(names) == {name: name for name in names}


# Entries beside the model.

PASSED_OVER = [
    *(f"{TEXT}logit_scale", f"{TEXT}text_projection", f"{TEXT}text_projection.weight"),
    *(f"{TEXT}transformer.logit_scale", f"{TEXT}transformer.text_projection.weight"),
    *(f"{TEXT}transformer.text_model.embeddings.position_ids", f"{TEXT}transformer.vision_model.embeddings.class"),
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recip_alphas_cumprod", "posterior_mean_coef1"),
    *("log_one_minus_alphas_cumprod", "logvar", "lvlb_weights", "model_ema.decay", "model_ema.num_updates"),
    *("loss.discriminator.main.0.weight", f"{VAE}loss.logvar", f"{VAE}model_ema.num_updates", "scale_factor"),
    *("embedding_manager.string_to_param_dict.x", "denoiser.sigmas", "global_step", "epoch"),
]


def test_entries_that_nobody_reads_are_passed_over(whole, theirs, sd1_folder, tmp_path):
    table = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    surplus = {k: torch.ones(1) for k in PASSED_OVER} | {"betas": table, "scale_factor": torch.tensor(0.18215)}
    for wrap in ("", "model."):
        save_file({wrap + k: v for k, v in (whole | surplus).items()}, tmp_path / "x.safetensors")
        assert_same_states(open_any(tmp_path / "x.safetensors", config=sd1_folder).states, theirs.states)


@pytest.mark.parametrize(
    "stranger", ["banana", "v_pred", f"{UNET}banana.weight", f"{VAE}encoder.banana", f"{TEXT}transformer.banana"]
)
def test_any_other_entry_is_named(whole, sd1_folder, tmp_path, stranger):
    save_file(whole | {stranger: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"x.safetensors.*0 tensors missing, 1 unknown.*(banana|v_pred)"):
        open_any(tmp_path / "x.safetensors", config=sd1_folder)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([f"{UNET}label_emb.0.0.weight", f"{UNET}out.2.weight"], "Stable Diffusion XL, or another model that reads"),
        (["input_blocks.0.0.weight", "label_emb.0.0.weight"], "Stable Diffusion XL, or another model that reads"),
        (["unet.down_blocks.0.x", "vae.encoder.conv_in.weight"], "a pipeline in diffusers' names in one file"),
        (["module.down_blocks.0.x"], "a U-Net's weights alone"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, names, sentence):
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=f"x.safetensors is {sentence}"):
        open_any(tmp_path / "x.safetensors")


def test_folders_of_wrapped_parts_are_read(sd1_folder, theirs, tmp_path):
    shutil.copytree(sd1_folder, tmp_path / "folder")
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        place = tmp_path / f"folder/{part}/{file}.safetensors"
        save_file({f"module._orig_mod.{k}": v for k, v in load_file(place).items()}, place)
    assert_same_states(open_any(tmp_path / "folder").states, theirs.states)


def test_a_part_s_folder_is_completed_from_config(sd1_folder, theirs):
    with pytest.raises(ConfigError, match="has no autoencoder and no text encoder: it holds U-Net only"):
        open_any(sd1_folder / "unet")
    assert_same_states(open_any(sd1_folder / "unet", config=sd1_folder).states, theirs.states)


@pytest.mark.parametrize("prefix", PARTS)
def test_quantised_files_are_refused(whole, sd1_folder, tmp_path, prefix):
    """Integers of the right shapes would be taken for the numbers that they stand for."""
    save_file(
        {k: v.to(torch.int8) if k.startswith(prefix) else v for k, v in whole.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ConfigError, match=r"as torch.int8, codes that stand for numbers: quantised files are not read"):
        open_any(tmp_path / "x.safetensors", config=sd1_folder)
    narrow = {k: v.to(torch.float8_e5m2) if k.startswith(prefix) else v for k, v in whole.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")  # floating numbers are what they are
    found = open_any(tmp_path / "narrow.safetensors", config=sd1_folder).states
    assert any(tensor.dtype == torch.float8_e5m2 for tensor in found[PARTS[prefix][0]].values())
