"""Adapters' files: what is written loads elsewhere with the same effect, what others write is read, nothing is lost."""

from __future__ import annotations

import json

import diffusers
import huggingface_hub
import pytest
import torch
from adapter_files import EVERYWHERE, assert_same_lora, random_hypernetwork, random_lora, sequence, weights
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from format_checks import hub_copy
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.adapters.content import Embedding, HypernetworkTensors, Lora, LowRank
from ldm.formats.adapters import adapter_kind, read_adapter, write_adapter
from ldm.formats.checkpoint import read
from ldm.formats.keys.unet import compvis_names


@pytest.fixture(scope="module")
def folders(sd1_folder, sd2_folder):
    return {"sd1": sd1_folder, "sd2": sd2_folder}


@pytest.fixture(scope="module")
def bases(folders):
    return {name: weights(read(folder)) for name, folder in folders.items()}


@pytest.fixture
def pipelines(folders):
    return lambda name: diffusers.StableDiffusionPipeline.from_pretrained(folders[name], safety_checker=None)


def of_pipeline(pipeline) -> dict[str, torch.Tensor]:
    """Its weights by our names; fused adapters are taken off first."""
    pipeline.unload_lora_weights()
    text = {
        f"text_encoder.text_model.{k.removeprefix('text_model.')}": v
        for k, v in pipeline.text_encoder.state_dict().items()
    }
    return {f"unet.{k}": v for k, v in pipeline.unet.state_dict().items()} | text


def assert_has_in_it(found: dict, base: dict, lora: Lora, strength: float = 1.0) -> None:
    """Whether weights are the base's with a LoRA merged in, and the base's alone everywhere else."""
    assert found.keys() == base.keys()
    for name, weight in base.items():
        update = lora.layers.get(name.removesuffix(".weight"))
        if update is None or not name.endswith(".weight"):
            assert torch.equal(found[name], weight), name
            continue
        wanted = update.merged(weight, strength)
        assert (wanted - weight).norm() > 0.1 * weight.norm(), name
        assert (found[name] - wanted).norm() < 1e-5 * wanted.norm(), name


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


CASES = [
    ("kohya", dict(alphas=(2.0,))),
    ("peft", dict(alphas=(2.0, 3.5, 8.0))),
    ("peft", dict(alphas=(4.0,), dora=True)),
]


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("format", "options"), CASES, ids=["kohya", "peft", "peft-dora"])
def test_diffusers_loads_what_is_written(tmp_path, pipelines, bases, name, format, options):
    lora = random_lora(bases[name], **options)
    write_adapter(lora, tmp_path / "x.safetensors", format)
    pipeline = pipelines(name)
    pipeline.load_lora_weights(tmp_path / "x.safetensors")
    pipeline.fuse_lora(lora_scale=1.0)
    assert_has_in_it(of_pipeline(pipeline), bases[name], lora)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=lambda s: "".join(s) or "plain"
)
def test_what_peft_and_diffusers_write_is_read(tmp_path, pipelines, bases, settings):
    pipeline = pipelines("sd1")
    torch.manual_seed(0)
    layers = ["attn1.to_k", "attn2.to_out.0", "proj_in", "resnets.0.conv1"]
    patterns = {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"^mid_block.resnets.0.conv1": 7, "to_out.0": 3}}
    pipeline.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=layers, init_lora_weights=False, **patterns, **settings)
    )
    pipeline.text_encoder.add_adapter(
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "fc1"], init_lora_weights=False, **settings)
    )
    states = [get_peft_model_state_dict(m, adapter_name="default") for m in (pipeline.unet, pipeline.text_encoder)]
    said = _collate_lora_metadata({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, *states, **said)
    lora = read_adapter(tmp_path, bases["sd1"])
    assert {x.rank for x in lora.layers.values()} == {2, 3, 4}
    pipeline.fuse_lora()
    assert_has_in_it(of_pipeline(pipeline), bases["sd1"], lora)


def test_older_spellings_of_diffusers_are_read(tmp_path, bases):
    lora = random_lora(bases["sd1"], layers=r".*(attn[12]|self_attn)\..*", ranks=(4,), alphas=(4.0,))
    peft = {}
    for name, update in lora.layers.items():
        name = name.replace("text_model.", "")  # as transformers has it since 5.6
        peft |= {f"{name}.lora_A.weight": update.down, f"{name}.lora_B.weight": update.up}
    # 2024: .lora.down, and .lora_linear_layer.down in the text encoder
    save_file(convert_state_dict_to_diffusers(peft), tmp_path / "new.safetensors")
    assert any(".lora_linear_layer." in key for key in load_file(tmp_path / "new.safetensors"))
    # 2023: attention processors, with and without the part's name
    processors = {}
    for key, tensor in peft.items():
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out.0", "out"), ("out", "out")):
            key = key.replace(f".to_{ours}.lora_", f".processor.to_{theirs}_lora.")
            key = key.replace(f".{ours}_proj.lora_", f".to_{theirs}_lora.")
        processors[key.replace("_lora.A.", "_lora.down.").replace("_lora.B.", "_lora.up.")] = tensor
    assert any(".attn1.processor.to_out_lora.up.weight" in key for key in processors)
    assert any(".self_attn.to_q_lora.down.weight" in key for key in processors)
    torch.save(processors, tmp_path / "old.bin")
    assert_same_lora(lora, read_adapter(tmp_path / "new.safetensors", bases["sd1"]))
    assert_same_lora(lora, read_adapter(tmp_path / "old.bin", bases["sd1"]))
    only = {k.removeprefix("unet."): v for k, v in processors.items() if k.startswith("unet.")}
    torch.save(only, tmp_path / "oldest.bin")
    unet = Lora({k: v for k, v in lora.layers.items() if k.startswith("unet.")})
    assert_same_lora(unet, read_adapter(tmp_path / "oldest.bin", bases["sd1"]))


@pytest.mark.parametrize(("part", "tops"), [("unet", ["to_q"]), ("text_encoder", ["q_proj"])])
def test_a_folder_of_peft_is_read(tmp_path, bases, part, tops):
    names = {k: v for k, v in bases["sd1"].items() if k.startswith(part)}
    lora = random_lora(names, layers=rf".*({'|'.join(tops)})", ranks=(4,), alphas=(6.0,))
    tensors = {}
    for name, update in lora.layers.items():
        path = "base_model.model." + name.removeprefix(f"{part}.")
        tensors |= {f"{path}.lora_A.weight": update.down, f"{path}.lora_B.weight": update.up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6}))
    assert_same_lora(lora, read_adapter(tmp_path, bases["sd1"]))


def test_a_hub_id_is_read_from_its_cache(tmp_path, bases, monkeypatch):
    lora = random_lora(bases["sd1"])
    write_adapter(lora, tmp_path / "folder/pytorch_lora_weights.safetensors", "peft")
    hub_copy(tmp_path, "somebody/cats", tmp_path / "folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert adapter_kind("somebody/cats") == "lora"
    assert_same_lora(lora, read_adapter("somebody/cats", bases["sd1"]))


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize("dora", [False, True])
def test_loras_come_back_bit_for_bit(tmp_path, bases, name, format, dora):
    lora = random_lora(bases[name], alphas=(2.0, 0.1, 8.0), dora=dora)
    lora.metadata = {"ss_training_comment": "a red cat", "ss_base_model_version": "mine"}
    write_adapter(lora, tmp_path / "x.safetensors", format)
    assert adapter_kind(tmp_path / "x.safetensors") == "lora"
    assert_same_lora(lora, read_adapter(tmp_path / "x.safetensors", bases[name]))
    assert_same_lora(lora, read_adapter(tmp_path / "x.safetensors"))  # Stable Diffusion's words instead of the base
    assert not list(tmp_path.glob("*.part"))
    write_adapter(lora, tmp_path / "half.safetensors", format, dtype="float16")
    for name, half in read_adapter(tmp_path / "half.safetensors").layers.items():
        assert torch.equal(half.up, lora.layers[name].up.half().float()) and half.alpha == lora.layers[name].alpha


def test_kohyas_layout_is_theirs(tmp_path, bases):
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    lora = random_lora(bases["sd1"], layers=f"unet.{path}|unet.conv_in", ranks=(4,), alphas=(2.0,))
    write_adapter(lora, tmp_path / "x.safetensors", "kohya")
    found, theirs = load_file(tmp_path / "x.safetensors"), f"lora_unet_{path.replace('.', '_')}"
    assert {k for k in found if "conv_in" not in k} == {
        f"{theirs}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert found[f"{theirs}.alpha"].shape == () and found[f"{theirs}.alpha"] == 2
    assert found["lora_unet_conv_in.lora_up.weight"].shape == (32, 4, 1, 1)
    said = metadata(tmp_path / "x.safetensors")
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "2.0",
    )
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2.0"}
    # without an alpha it is the rank
    del found[f"{theirs}.alpha"]
    save_file(found, tmp_path / "y.safetensors")
    assert read_adapter(tmp_path / "y.safetensors", bases["sd1"]).layers[f"unet.{path}"].alpha == 4


@pytest.mark.parametrize(("width", "name"), [(768, "sd_v1"), (1024, "sd_v2"), (512, None)])
def test_kohyas_name_of_the_base_is_its_texts_width(tmp_path, width, name):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    write_adapter(
        Lora({layer: LowRank(torch.ones(1, width), torch.ones(8, 1), 1.0)}), tmp_path / "x.safetensors", "kohya"
    )
    assert metadata(tmp_path / "x.safetensors").get("ss_base_model_version") == name


def test_compvis_paths_of_the_unet_are_found(tmp_path, bases):
    lora = random_lora(bases["sd1"], layers=EVERYWHERE.split("|text_encoder")[0])
    unet = [k.removeprefix("unet.") for k in bases["sd1"] if k.startswith("unet.")]
    table = compvis_names(unet)
    tensors = {}
    for name, update in lora.layers.items():
        path = table[name.removeprefix("unet.") + ".weight"].removesuffix(".weight").replace(".", "_")
        tensors |= {f"lora_unet_{path}.lora_down.weight": update.down, f"lora_unet_{path}.lora_up.weight": update.up}
        tensors[f"lora_unet_{path}.alpha"] = torch.tensor(update.alpha)
    assert {"lora_unet_input_blocks_0_0.alpha", "lora_unet_input_blocks_6_0_op.alpha"} <= tensors.keys()
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same_lora(lora, read_adapter(tmp_path / "x.safetensors", bases["sd1"]))


def test_kohyas_text_layers_are_found_with_and_without_transformers_old_level(tmp_path, bases):
    lora = random_lora(bases["sd1"], layers=r"text_encoder\..*self_attn.*")
    write_adapter(lora, tmp_path / "old.safetensors", "kohya")
    found = load_file(tmp_path / "old.safetensors")
    save_file({k.replace("_text_model_", "_"): v for k, v in found.items()}, tmp_path / "new.safetensors")
    assert all(k.startswith("lora_te_text_model_encoder_layers_") for k in found)
    for base in (bases["sd1"], None):
        assert_same_lora(lora, read_adapter(tmp_path / "new.safetensors", base))


def test_factors_of_1x1_convolutions_may_be_matrices(tmp_path):
    down, up, x = torch.randn(2, 8), torch.randn(6, 2), "lora_unet_mid_block_attentions_0_proj_in"
    for d, u in (
        (down, up[..., None, None]),
        (down[..., None, None], up),
        (down[..., None, None], up[..., None, None]),
    ):
        save_file(
            {f"{x}.lora_down.weight": d.contiguous(), f"{x}.lora_up.weight": u.contiguous()}, tmp_path / "x.safetensors"
        )
        found = read_adapter(tmp_path / "x.safetensors").layers["unet.mid_block.attentions.0.proj_in"]
        torch.testing.assert_close(found.merged(torch.zeros(6, 8, 1, 1)).flatten(1), up @ down)


def test_locons_tucker_form_is_multiplied_out(tmp_path):
    down, mid, up, x = torch.randn(3, 8, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(6, 3, 1, 1), "lora_unet_conv_in"
    tensors = {f"{x}.lora_down.weight": down, f"{x}.lora_mid.weight": mid, f"{x}.lora_up.weight": up}
    save_file(tensors | {f"{x}.alpha": torch.tensor(1.5)}, tmp_path / "x.safetensors")
    found = read_adapter(tmp_path / "x.safetensors").layers["unet.conv_in"]
    image, conv = torch.randn(1, 8, 5, 5), torch.nn.functional.conv2d
    wanted = 0.5 * conv(conv(conv(image, down), mid, padding=1), up)
    assert torch.allclose(conv(image, found.delta(), padding=1), wanted, atol=1e-5)


def test_diffusers_loads_embeddings_that_are_written(tmp_path, pipelines):
    pipeline = pipelines("sd1")
    vectors = torch.randn(3, 32)
    for format, end in (("a1111", "pt"), ("diffusers", "safetensors"), ("kohya", "safetensors")):
        word = f"<{format}>"
        write_adapter(Embedding(word, vectors), tmp_path / f"{format}.{end}", format)
        given = {"token": word} if format == "kohya" else {}  # its files name no word
        pipeline.load_textual_inversion(tmp_path / f"{format}.{end}", **given)
        ids = pipeline.tokenizer.convert_tokens_to_ids([word, f"{word}_1", f"{word}_2"])
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], vectors)


@pytest.mark.parametrize("n", [1, 3])
def test_embeddings_come_back_bit_for_bit(tmp_path, n):
    made = Embedding("<red cat>", torch.randn(n, 32))
    for format, end in (("a1111", "pt"), ("diffusers", "safetensors"), ("kohya", "safetensors")):
        path = tmp_path / f"{format}.{end}"
        write_adapter(made, path, format)
        assert adapter_kind(path) == "textual_inversion"
        found = read_adapter(path)
        assert found.token == made.token and torch.equal(found.vectors, made.vectors)
        assert read_adapter(path, token="other").token == "other"


def test_embeddings_of_others_are_read(tmp_path):
    one = torch.randn(32)
    for i, (content, token) in enumerate(
        [
            ({"catstyle": one}, "catstyle"),
            ({"<cat>": one[None]}, "<cat>"),
            ({"string_to_token": {"*": 265}, "string_to_param": {"*": one[None]}, "name": "cat", "step": 9}, "cat"),
            ({"string_to_param": {"*": torch.nn.Parameter(one[None])}}, "5"),
            ({"string_to_param": torch.nn.ParameterDict({"<cat>": torch.nn.Parameter(one[None])})}, "<cat>"),
            ({"emb_params": one[None]}, "5"),
            ({"emp_params": one[None]}, "5"),
        ]
    ):
        torch.save(content, tmp_path / "5.pt")
        found = read_adapter(tmp_path / "5.pt")
        assert found.token == token and torch.equal(found.vectors, one[None]), i
    save_file({"<cat>": one}, tmp_path / "learned_embeds.safetensors")
    assert read_adapter(tmp_path).token == "<cat>"


STRUCTURES = [
    {},
    {"structure": [1.0, 2.0, 2.0, 1.0], "activation": "swish", "layer_norm": True, "dropout": [0.0, 0.3, 0.1, 0.0]},
    {"structure": [1.0, 1.5, 1.0], "activation": "relu", "activate_output": False, "step": 9, "name": "cats"},
    {"layer_norm": True, "activation": "relu", "activate_output": False},
]


@pytest.mark.parametrize("settings", STRUCTURES, ids=range(4))
def test_hypernetworks_come_back_bit_for_bit(tmp_path, settings):
    made = random_hypernetwork(**settings)
    write_adapter(made, tmp_path / "x.pt", "a1111")
    assert adapter_kind(tmp_path / "x.pt") == "hypernetwork"
    found = read_adapter(tmp_path / "x.pt")
    for width, pair in made.networks.items():
        for one, other in zip(pair, found.networks[width], strict=True):
            assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
            sequence(found, width).load_state_dict(other)  # strictly: A1111's own places in the sequence
    made.networks = found.networks = {}
    made.name = made.name or "x"
    assert found == made


def test_older_hypernetworks_are_filled_in_as_a1111_does(tmp_path):
    plain = random_hypernetwork().networks[32]
    old = tuple(
        {k.replace("linear.0", "linear1").replace("linear.1", "linear2"): v for k, v in part.items()} for part in plain
    )
    torch.save({32: old, "name": "cats"}, tmp_path / "x.pt")
    found = read_adapter(tmp_path / "x.pt")
    assert all(torch.equal(v, found.networks[32][1][k]) for k, v in plain[1].items())
    found.networks = {}
    assert found == HypernetworkTensors({}, [1.0, 2.0, 1.0], "linear", False, True, None, "cats", None)
    # dropout without a structure: 0.3 after all maps but the last two, and after the last but one if it says so
    for last, dropout in ((False, [0.0, 0.3, 0.0, 0.0]), (True, [0.0, 0.3, 0.3, 0.0])):
        made = random_hypernetwork(structure=[1.0, 2.0, 2.0, 1.0], activation="relu", dropout=dropout)
        said = {
            "layer_structure": [1, 2, 2, 1],
            "activation_func": "relu",
            "use_dropout": True,
            "last_layer_dropout": last,
        }
        torch.save({**made.networks, **said}, tmp_path / "y.pt")
        assert read_adapter(tmp_path / "y.pt").dropout == dropout
