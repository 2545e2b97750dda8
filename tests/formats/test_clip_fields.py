"""Every setting of transformers' CLIPTextConfig goes through all layouts, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import published as published_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm import Pipeline
from ldm.checkpoints.pretrained import load_text_encoder
from ldm.errors import ConfigError
from ldm.formats import checkpoint as formats
from ldm.formats.diffusers.config import text_node
from ldm.formats.match import settings
from ldm.text.clip import CLIPText

TEXT = "a red cat on a green chair"
# A value for each setting that the base has not; those of one line belong together.
VARIED = [
    {"intermediate_size": 37},
    {"hidden_act": "gelu"},
    {"hidden_act": "gelu_new", "intermediate_size": 256},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 1e-2},
    {"num_attention_heads": 8},
    {"num_attention_heads": 1},
    {"num_hidden_layers": 1},
    {"max_position_embeddings": 40},
    {"vocab_size": 800},
    {"projection_dim": 12},
    {"attention_dropout": 0.25},
    {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},  # as Stable Diffusion 1's own folder says
    {"bos_token_id": 3, "eos_token_id": 700, "pad_token_id": None},
    {"initializer_range": 0.5, "initializer_factor": 2.0},
]
CARRIED = set(CLIPTextConfig().to_dict()) & {
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}
# Of what every configuration of transformers has: how fresh weights are drawn, and what is given back beside them.
OF_NO_ACCOUNT = {
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "problem_type"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "initializer_range"),
    *("initializer_factor", "_name_or_path", "model_type", "output_attentions"),
}


def test_no_setting_is_forgotten():
    """A setting that a later transformers adds turns up here."""
    assert set(CLIPTextConfig().to_dict()) == CARRIED | OF_NO_ACCOUNT
    node = text_node({}, "nothing said")
    theirs = CLIPTextConfig()
    assert (node["heads"], node["width"], node["max_length"]) == (8, 512, 77)
    assert node["marks"] == [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]


def model(**varied) -> CLIPTextModel:
    base = published_models._text(2, 1).config.to_dict()
    made = CLIPTextModel(CLIPTextConfig(**(base | varied))).eval()
    published_models.randomise(made, 7)
    return made


@pytest.fixture
def folder(sd1_folder, tmp_path):
    """A pipeline's folder with another text encoder in it."""

    def made(text: torch.nn.Module) -> Path:
        shutil.copytree(sd1_folder, tmp_path / "theirs", ignore=shutil.ignore_patterns("text_encoder"))
        text.save_pretrained(tmp_path / "theirs/text_encoder")
        return tmp_path / "theirs"

    return made


@pytest.mark.slow
@pytest.mark.parametrize("varied", VARIED, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()))
def test_a_setting_goes_through_every_layout(folder, tmp_path, varied):
    theirs = model(**varied)
    read = formats.read(folder(theirs))
    formats.write(read, tmp_path / "again", "diffusers")
    copies = [read, formats.read(tmp_path / "again")]
    if theirs.config.hidden_act in ("gelu", "quick_gelu"):
        formats.write(read, tmp_path / "again.safetensors", "compvis")
        copies.append(formats.read(tmp_path / "again.safetensors"))
    else:  # the names in such a file say one of the two
        with pytest.raises(ConfigError, match=f"cannot carry text_encoder.activation={theirs.config.hidden_act}"):
            formats.write(read, tmp_path / "again.safetensors", "compvis")
    for found in copies:
        encoder = built(found)
        ids = encoder.tokenize([TEXT, ""])
        with torch.no_grad():
            expected = theirs(ids).last_hidden_state
        assert (encoder(ids).context - expected).abs().max() <= 1e-5
    saved = CLIPTextModel.from_pretrained(tmp_path / "again/text_encoder").eval()
    assert {k: getattr(saved.config, k) for k in CARRIED} == {k: getattr(theirs.config, k) for k in CARRIED}
    with torch.no_grad():
        one, other = theirs(ids), saved(ids)
    assert torch.equal(one.last_hidden_state, other.last_hidden_state)
    assert torch.equal(one.pooler_output, other.pooler_output)


def built(checkpoint: formats.Stored) -> CLIPText:
    node = {k: v for k, v in checkpoint.config["text_encoder"].items() if k != "_target_"}
    encoder = CLIPText(**node).eval().requires_grad_(False)
    encoder.load_state_dict(checkpoint.states["text_encoder"])
    encoder.load_tokenizer(checkpoint.tokenizer)
    return encoder


@pytest.mark.slow
def test_a_pipeline_of_ours_keeps_the_settings(folder, tmp_path):
    """Drawn alike from their folder, from a checkpoint folder of ours and from one file."""
    theirs = folder(model(intermediate_size=37, layer_norm_eps=1e-3, hidden_act="gelu", num_attention_heads=2))
    pipe = Pipeline.load(theirs)
    drawn = pipe.sample(TEXT, num_steps=2)
    for format, name in (("ldm", "ours"), ("compvis", "one.safetensors"), ("diffusers", "back")):
        pipe.save(tmp_path / name, format)
        torch.testing.assert_close(Pipeline.load(tmp_path / name).sample(TEXT, num_steps=2), drawn, atol=1e-4, rtol=0)
    assert settings(Pipeline.load(tmp_path / "ours").config["text_encoder"], "text_encoder")["feed_forward"] == 37


def test_attention_drops_out_while_it_is_trained():
    encoder = CLIPText(vocab_size=64, max_length=8, width=32, layers=1, heads=2, attention_dropout=0.9)
    ids = torch.arange(8)[None]
    assert not torch.equal(encoder(ids).context, encoder(ids).context)
    assert torch.equal(encoder.eval()(ids).context, encoder(ids).context)


def test_the_text_half_of_a_whole_clip_is_read_as_transformers_reads_it(tmp_path):
    """`text_config_dict` of the first files stands above `text_config`, with the defaults of what it leaves unsaid."""
    for said in (
        {"text_config": {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 2}},
        {"text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 32, "num_attention_heads": 4}},
        {"text_config": {"hidden_act": "gelu"}, "text_config_dict": None},
    ):
        theirs = CLIPConfig(**said).text_config
        node = settings(text_node(said, "here"), "text_encoder")
        assert (node["width"], node["heads"], node["activation"]) == (
            theirs.hidden_size,
            theirs.num_attention_heads,
            theirs.hidden_act,
        )
        assert (node["feed_forward"] or 4 * node["width"]) == theirs.intermediate_size


def test_a_projection_is_left_out_and_its_width_kept(folder, tmp_path):
    base = published_models._text(2, 1).config.to_dict() | {"projection_dim": 12}
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**base)).eval()
    place = folder(theirs)
    index = json.loads((place / "model_index.json").read_text())
    index["text_encoder"][1] = "CLIPTextModelWithProjection"
    (place / "model_index.json").write_text(json.dumps(index))
    read = formats.read(place)
    ids = built(read).tokenize([TEXT])
    with torch.no_grad():
        torch.testing.assert_close(built(read)(ids).context, theirs(ids).last_hidden_state, atol=1e-5, rtol=0)
    assert read.config["text_encoder"]["projection_dim"] == 12


REFUSED = [
    ({"is_causal": False}, "is_causal=False"),
    ({"eos_token_id": [4, 5]}, r"eos_token_id=\[4, 5\]"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config="),
]


@pytest.mark.parametrize(("said", "words"), REFUSED)
def test_what_our_encoder_has_not_is_refused_by_name(said, words):
    with pytest.raises(ConfigError, match=f"here says {words}"):
        text_node(said, "here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"activation": "gelu2"}, "activation=gelu2: there is .*quick_gelu"), ({"heads": 5}, "heads=5 do not divide")],
)
def test_settings_of_ones_own_are_checked(arguments, words):
    with pytest.raises(ConfigError, match=f"text_encoder.{words}"):
        CLIPText(vocab_size=64, max_length=8, width=32, layers=1, **({"heads": 2} | arguments))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_attention_heads", 8, "text_encoder.heads=8"),
        ("hidden_act", "gelu", "text_encoder.activation=gelu"),
        ("layer_norm_eps", 1e-3, r"\+text_encoder.norm_eps=0.001"),
    ],
)
def test_published_weights_of_another_function_are_refused(tmp_path, field, value, words):
    """Their tensors have the same shapes: only config.json tells."""
    theirs = model(**{field: value})
    theirs.save_pretrained(tmp_path / "clip")
    published_models.save_tokenizer(published_models.tokenizer(1), tmp_path / "clip")
    size = dict(vocab_size=theirs.config.vocab_size, max_length=77, width=32, layers=2, heads=4)
    with pytest.raises(ConfigError, match=f"set {words}"):
        load_text_encoder(CLIPText(**size), str(tmp_path / "clip"))
    ours = {"num_attention_heads": "heads", "hidden_act": "activation", "layer_norm_eps": "norm_eps"}[field]
    load_text_encoder(CLIPText(**(size | {ours: value})), str(tmp_path / "clip"))


def test_a_single_file_tells_the_feed_forward_width_by_its_shapes(folder, tmp_path):
    """config= gives the rest, and one of another width is another model's."""
    read = formats.read(folder(model(intermediate_size=37)))
    formats.write(read, tmp_path / "all.safetensors", "compvis")
    save_file(load_file(tmp_path / "all.safetensors"), tmp_path / "bare.safetensors")
    assert formats.read(tmp_path / "bare.safetensors", tmp_path / "theirs").config["text_encoder"]["feed_forward"] == 37
    shutil.rmtree(tmp_path / "theirs/text_encoder")
    model().save_pretrained(tmp_path / "theirs/text_encoder")
    with pytest.raises(ConfigError, match=r"text_encoder.feed_forward=37, but config= says None"):
        formats.read(tmp_path / "bare.safetensors", tmp_path / "theirs")
