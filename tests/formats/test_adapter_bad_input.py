"""Adapters' files that are damaged, of other kinds or of another base: one line says so, and nothing else happens."""

from __future__ import annotations

import json
import os

import pytest
import torch
from adapter_files import low_rank, random_hypernetwork, random_lora
from safetensors.torch import save_file

from ldm.adapters.content import Embedding, HypernetworkTensors, Lora
from ldm.errors import ConfigError
from ldm.formats.adapters import adapter_kind, read_adapter, write_adapter

ONE = torch.ones(2, 2)
X = "lora_unet_mid_block_attentions_0_proj_in"
BASE = {"unet.mid_block.attentions.0.proj_in.weight": torch.ones(6, 8), "unet.conv_in.weight": torch.ones(6, 8, 3, 3)}


def kohya(**changes) -> dict:
    """A LoRA of one layer, with entries replaced, or left out where they are None."""
    good = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(6, 2), "alpha": torch.tensor(1.0)}
    return {f"{X}.{k}": v for k, v in (good | changes).items() if v is not None}


OTHERS = [
    ({f"{X}.hada_w1_a": ONE, f"{X}.alpha": ONE}, "a LoHa .*merge it with the program that made it"),
    ({f"{X}.lokr_w1": ONE, f"{X}.lokr_w2": ONE}, "a LoKr "),
    ({"unet.conv_in.lokr_w1_a": ONE}, "a LoKr "),
    ({f"{X}.oft_blocks": ONE}, "an OFT "),
    ({f"{X}.weight": ONE, f"{X}.on_input": ONE}, r"an \(IA\)3 "),
    ({"base_model.model.to_k.ia3_l": ONE}, r"an \(IA\)3 "),
    ({f"{X}.a1.weight": ONE, f"{X}.b1.weight": ONE}, "a GLoRA"),
    (kohya(diff=ONE), "whole differences of weights"),
    (kohya(w_norm=ONE), "whole differences of weights"),
    ({"unet.conv_in.lora_B.bias": ONE, "unet.conv_in.lora_B.weight": ONE}, "a LoRA with biases"),
    ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ONE}, "Stable Diffusion XL.*Take the version for"),
    ({"text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight": ONE}, "Stable Diffusion XL"),
    ({"clip_l": ONE, "clip_g": ONE}, "an embedding for Stable Diffusion XL"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": ONE}, "a LoRA for a transformer"),
    ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": ONE}, "a LoRA for a transformer"),
    ({"lora_te_model_transformer_resblocks_0_mlp_c_fc.lora_down.weight": ONE}, "a LoRA in OpenCLIP's names"),
    ({"model.diffusion_model.out.2.weight": ONE}, "a whole checkpoint, not an adapter: give it as checkpoint=PATH"),
    ({"first_stage_model.encoder.conv_in.weight": ONE}, "an autoencoder, not an adapter"),
    ({"control_model.input_blocks.0.0.weight": ONE}, "a ControlNet, and no adapter that is read here"),
    ({"conditioner.embedders.0.x": ONE}, "Stable Diffusion XL, and no adapter"),
    ({"transformer_blocks.0.attn.to_q.weight": ONE}, "a transformer .*, and no adapter"),
    ({"banana.weight": ONE}, "of no known kind: its entries are called banana.weight, and no adapter"),
]


@pytest.mark.parametrize(("content", "sentence"), OTHERS, ids=lambda x: str(x)[:40])
def test_other_files_are_called_what_they_are(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pt")
    for ask in (adapter_kind, read_adapter):
        with pytest.raises(ConfigError, match=f"x.pt is .*{sentence}") as error:
            ask(tmp_path / "x.pt")
        assert "\n" not in str(error.value)


LORAS = [
    (kohya(**{"lora_up.weight": None}), r"only lora_down.*|no up: it was cut short"),
    (kohya(**{"lora_down.weight": None}), r"no down"),
    ({f"{X}.dora_scale": ONE}, r"no down and no up"),
    (kohya(**{"lora_up.weight": torch.ones(6, 3)}), r"ranks that differ \(down \(2, 8\), up \(6, 3\)\)"),
    (kohya(**{"lora_up.weight": torch.ones(6)}), "neither a linear layer's nor a convolution's"),
    (kohya(**{"lora_down.weight": torch.ones(0, 8), "lora_up.weight": torch.ones(6, 0)}), "neither a linear layer's"),
    (kohya(**{"lora_up.weight": torch.ones(6, 2, 3, 3)}), "kernels in its second factor"),
    (kohya(**{"lora_down.weight": torch.ones(2, 8, dtype=torch.int8)}), r"torch\.int8, not of floating point"),
    (kohya(**{"lora_down.weight": torch.full((2, 8), torch.nan)}), "infinities or NaN"),
    (kohya(**{"lora_mid.weight": torch.ones(3, 3, 3, 3)}), r"a middle of \(3, 3, 3, 3\)"),
    (kohya(alpha=torch.ones(3)), "alpha that is not one number"),
    (kohya(alpha=torch.tensor(torch.inf)), "alpha that is not one number"),
    (kohya(alpha=2.0), "alpha is no tensor"),
    (kohya(dora_scale=torch.ones(1, 8)), r"DoRA whose lengths are \(1, 8\) for 6 outputs"),
    (kohya(dora_scale=torch.ones(1, 6)), r"DoRA whose lengths are \(1, 6\) for 6 outputs"),
    (kohya(dora_scale=torch.tensor(1.0)), "DoRA whose lengths"),
    (kohya() | {f"{X}.lora_sideways.weight": ONE}, rf"1 entry that no LoRA read here has: {X}\.lora_sideways\.weight"),
    (
        kohya() | {f"lora_unet_up_{i}.alpha": ONE for i in range(5)},
        r"changes 5 layers that this base does not have: lora_unet_up_0, lora_unet_up_1, lora_unet_up_2\. It belongs",
    ),
    (kohya() | {"unet.mid_block.attentions.0.proj_in.lora_A.weight": ONE}, "twice, in two spellings"),
]


@pytest.mark.parametrize(("content", "sentence"), LORAS, ids=lambda x: str(x)[:40])
def test_damaged_loras_are_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=f"x.pt.*({sentence})") as error:
        read_adapter(tmp_path / "x.pt", BASE)
    assert "\n" not in str(error.value)


def test_the_good_lora_of_this_table_is_read(tmp_path):
    torch.save(kohya(), tmp_path / "x.pt")
    assert list(read_adapter(tmp_path / "x.pt", BASE).layers) == ["unet.mid_block.attentions.0.proj_in"]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("{not json", "lora_adapter_metadata is not JSON"),
        ("[1]", "is no JSON object"),
        ('{"unet.lora_alpha": "much"}', "settings of alpha cannot be read"),
        ('{"unet.lora_alpha": NaN}', "NaN is no number"),
        ('{"unet.lora_alpha": 1' + "0" * 300 + "}", "settings of alpha cannot be read"),
        ('{"unet.alpha_pattern": {"(n+)+x": 2}}', "settings of alpha cannot be read"),  # takes for ever to match
        ('{"unet.alpha_pattern": {"' + "(n|n)" * 40 + '": 2}}', "settings of alpha cannot be read"),
        ('{"unet.alpha_pattern": {".*.*.*.*x": 2}}', "settings of alpha cannot be read"),
        ('{"unet": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": 3}', "settings of alpha cannot be read"),
        ('{"unet.alpha_pattern": {"(": 2}}', "settings of alpha cannot be read"),
        ('{"unet.alpha_pattern": [2]}', "settings of alpha cannot be read"),
        ('{"unet.lora_alpha": [2]}', "settings of alpha cannot be read"),
    ],
)
def test_damaged_settings_of_peft_are_refused(tmp_path, said, sentence):
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 8, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(6, 2, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ConfigError, match=sentence):
        read_adapter(tmp_path / "x.safetensors", BASE)


EMBEDDINGS = [
    ({"<a>": ONE, "<b>": ONE}, "holds 2 words"),
    ({"string_to_param": {"*": ONE, "x": ONE}}, "holds 2 words"),
    ({"string_to_param": 7}, "holds no words"),
    ({"string_to_param": {"*": [1.0, 2.0]}}, "is a list, not a tensor"),
    ({"<a>": torch.ones(2, 2, 2)}, r"is \(2, 2, 2\), and vectors of words are \(n, width\)"),
    ({"<a>": torch.ones(0, 2)}, r"is \(0, 2\), and vectors of words are \(n, width\)"),
    ({"emb_params": ONE.long()}, "not of floating point"),
]


@pytest.mark.parametrize(("content", "sentence"), EMBEDDINGS, ids=lambda x: str(x)[:40])
def test_damaged_embeddings_are_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=sentence):
        read_adapter(tmp_path / "x.pt")


def hypernetwork(**changes) -> dict:
    return {**random_hypernetwork().networks, **changes}


HYPERNETWORKS = [
    (hypernetwork(layer_structure=[1, 4, 1]), r"width 32: its layers are not those .*linear\.0\.weight"),
    (hypernetwork(is_layer_norm=True), r"not those that its settings describe \(linear\.1"),
    (hypernetwork(layer_structure=[2, 1]), "does not begin and end with 1"),
    (hypernetwork(layer_structure="long"), "its settings cannot be read"),
    (hypernetwork(layer_structure=[1, 2, 1], dropout_structure=[0.1]), "does not fit layer_structure"),
    (hypernetwork(layer_structure=[1, float("inf"), 1]), "its settings cannot be read"),
    (hypernetwork(step="many"), "its settings cannot be read"),
    ({**hypernetwork(), 64: ONE}, "64 is no pair of networks"),
    ({320: ({"linear.0.weight": 7}, {})}, "is a int, not a tensor"),
    ({320: ({}, {})}, "its layers are not those"),
]


@pytest.mark.parametrize(("content", "sentence"), HYPERNETWORKS, ids=lambda x: str(x)[-40:])
def test_damaged_hypernetworks_are_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=sentence):
        read_adapter(tmp_path / "x.pt")


def test_files_that_are_damaged_or_none_are_named(tmp_path, monkeypatch):
    write_adapter(random_lora(BASE, layers=".*"), tmp_path / "x.safetensors", "kohya")
    torch.save(kohya(), tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        whole = (tmp_path / name).read_bytes()
        for share in (0.0, 0.3, 0.9):
            (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ConfigError, match=f"{name}.*(is empty|cut short|damaged)"):
                read_adapter(tmp_path / name)
    (tmp_path / "x.pt").write_text("<!DOCTYPE html>")
    torch.save({}, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/model_index.json").write_text("{}")
    for name, sentence in [
        ("x.pt", "holds text, not tensors"),
        ("none.pt", "holds nothing at all"),
        ("folder", r"holds no adapter: it has none of adapter_model\.safetensors"),
        ("whole", "is a whole pipeline .*, not an adapter"),
        ("nothing", "there is nothing at this path"),
        ("nothing.pt", "there is nothing at this path"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            read_adapter(tmp_path / name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="adapter=nobody/nothing is not a folder here, and cannot be fetched"):
        read_adapter("nobody/nothing")


def test_code_in_an_adapter_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for content in ({"string_to_param": {"*": ONE}, "name": Evil()}, {320: ({"linear.0.weight": ONE}, Evil())}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ConfigError, match=r"asks for posix\.mkdir, which is code: it was not run"):
            read_adapter(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


def test_what_cannot_be_asked_of_a_reader(tmp_path):
    torch.save(kohya(), tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"token=cat names an embedding, and .* is a lora"):
        read_adapter(tmp_path / "x.pt", token="cat")
    torch.save({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": ONE}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="is CompVis' name of a layer: only with the base"):
        read_adapter(tmp_path / "x.pt")


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    lora, embedding = random_lora(BASE, layers=".*"), Embedding(None, torch.ones(1, 4))
    mixed = random_lora(BASE, layers=".*")
    mixed.layers["unet.conv_in"].magnitude = torch.ones(6)
    generator = torch.Generator()
    strange = Lora({"vae.conv_in": low_rank(torch.ones(2, 2), 1, 1.0, generator)})
    twins = Lora({f"unet.{name}": low_rank(torch.ones(2, 2), 1, 1.0, generator) for name in ("a.b", "a_b")})
    damaged = random_hypernetwork(layer_norm=True)
    damaged.layer_norm = False
    for content, name, format, sentence in [
        (lora, "x.safetensors", "a1111", "format=a1111 is not one that a LoRA is written in: choose kohya or peft"),
        (embedding, "x.pt", "peft", "an embedding is written in: choose diffusers or a1111 or kohya"),
        (lora, "x.pt", "kohya", r"is a \.safetensors file: give it that end"),
        (embedding, "x.safetensors", "diffusers", "give token=WORD"),
        (mixed, "x.safetensors", "peft", "cannot carry a unet of which some layers are DoRA. Use format=kohya"),
        (strange, "x.safetensors", "peft", "knows unet and text_encoder only"),
        (twins, "x.safetensors", "kohya", r"would call both unet\.a\.b and unet\.a_b lora_unet_a_b. Use format=peft"),
        (Lora({}), "x.safetensors", "kohya", "without layers"),
        (HypernetworkTensors({}), "x.pt", "a1111", "without networks"),
        (damaged, "x.pt", "a1111", "the hypernetwork to be written, width 32"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            write_adapter(content, tmp_path / name, format)
    with pytest.raises(ConfigError, match="dtype=int8 is not known"):
        write_adapter(lora, tmp_path / "x.safetensors", "kohya", dtype="int8")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_adapter(lora, tmp_path / "x.safetensors", "kohya")
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_a_peft_folder_without_readable_settings_is_refused(tmp_path):
    tensors = {"conv_in.lora_A.weight": torch.ones(2, 8, 3, 3), "conv_in.lora_B.weight": torch.ones(6, 2, 1, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6})[:-3])
    with pytest.raises(ConfigError, match=r"adapter_config\.json is not JSON"):
        read_adapter(tmp_path, BASE)
