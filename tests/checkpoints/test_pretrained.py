"""Published weights of the frozen parts: found, read in every spelling, refused by name when they cannot be had."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from tiny_training import config, make_data
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.autoencoders.kl import AutoencoderKL
from ldm.checkpoints.folder import find as find_checkpoint
from ldm.checkpoints.folder import load_parts
from ldm.checkpoints.pretrained import load_autoencoder, load_text_encoder
from ldm.errors import ConfigError
from ldm.text.clip import CLIPText
from ldm.text.tokenizer import build_tokenizer, save_tokenizer
from ldm.training.run.fit import train_run

CAPTIONS = ["a red star at the left", "a small blue circle", "wow!"]
SIZE = dict(width=32, heads=4, max_length=12)


def published_text(folder, layers, activation):
    """A folder as on the hub: a whole CLIP's file (with a picture half), tokenizer files beside it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS, 1024)
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act=activation,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(settings).eval()
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in model.state_dict().items()}
    folder.mkdir()
    save_file(
        {**state, "vision_model.class_embedding": torch.zeros(3), "logit_scale": torch.zeros(1)},
        folder / "model.safetensors",
    )
    save_tokenizer(tokenizer, folder)
    return model, tokenizer


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text_gives_transformers_states(tmp_path, activation):
    model, tokenizer = published_text(tmp_path / "clip", 2, activation)
    encoder = CLIPText(vocab_size=len(tokenizer), layers=2, activation=activation, **SIZE).eval()
    load_text_encoder(encoder, str(tmp_path / "clip"))
    ids = encoder.tokenize(CAPTIONS)
    assert ids.shape == (3, 12)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        torch.testing.assert_close(encoder.encode(CAPTIONS).context, expected, atol=1e-6, rtol=0)


def test_the_penultimate_layer_is_a_shorter_encoder_with_the_final_norm(tmp_path):
    """Stable Diffusion 2: 23 of 24 layers of OpenCLIP-H, then the final norm."""
    model, tokenizer = published_text(tmp_path / "clip", 3, "gelu")
    encoder = CLIPText(vocab_size=len(tokenizer), layers=2, activation="gelu", **SIZE).eval()
    load_text_encoder(encoder, str(tmp_path / "clip"))
    ids = encoder.tokenize(CAPTIONS)
    inner = getattr(model, "text_model", model)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(encoder.encode(CAPTIONS).context, inner.final_layer_norm(states), atol=1e-6, rtol=0)


def test_captions_are_padded_with_the_published_token(tmp_path):
    _, tokenizer = published_text(tmp_path / "clip", 1, "gelu")
    rows = {}
    for pad in ("<|endoftext|>", "!", None):
        encoder = CLIPText(vocab_size=len(tokenizer), layers=1, pad=pad, **SIZE)
        load_text_encoder(encoder, str(tmp_path / "clip"))
        rows[pad] = encoder.tokenize(["star"])[0].tolist()
        word = tokenizer("star")["input_ids"]
        token = encoder.tokenizer.convert_tokens_to_ids(pad or "<|endoftext|>")
        assert rows[pad] == word + [token] * (12 - len(word))
    assert rows["!"] != rows["<|endoftext|>"] == rows[None]


@pytest.mark.parametrize("old_names", [False, True])
def test_an_autoencoder_folder_of_diffusers_loads(tmp_path, old_names):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        norm_num_groups=8,
        scaling_factor=0.25,
    ).eval()
    theirs.save_pretrained(tmp_path / "pipeline/vae")
    if old_names:  # the first files called the attention's maps query, key, value and proj_attn
        state = {}
        for key, tensor in theirs.state_dict().items():
            for new, old in (
                (".to_q.", ".query."),
                (".to_k.", ".key."),
                (".to_v.", ".value."),
                (".to_out.0.", ".proj_attn."),
            ):
                key = key.replace(new, old)
            state[key] = tensor
        save_file(state, tmp_path / "pipeline/vae/diffusion_pytorch_model.safetensors")
    ours = AutoencoderKL(block_channels=[16, 32], layers_per_block=1, norm_groups=8).eval()
    load_autoencoder(ours, str(tmp_path / "pipeline"))  # a whole pipeline's folder
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = ours.encode(image).mode()
        torch.testing.assert_close(z, theirs.encode(image).latent_dist.mode(), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.latents.standardise(z), 0.25 * z)


def test_what_cannot_be_had_is_named_with_the_way_out(tmp_path):
    encoder = CLIPText(vocab_size=64, layers=1, **SIZE)
    with pytest.raises(ConfigError, match=r"text_encoder.pretrained=nobody/nothing is not a folder.*=DIR"):
        load_text_encoder(encoder, "nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"does not hold config.json and diffusion_pytorch_model.safetensors"):
        load_autoencoder(AutoencoderKL(block_channels=[16, 32], norm_groups=8), str(tmp_path / "empty"))
    _, tokenizer = published_text(tmp_path / "other", 1, "gelu")
    with pytest.raises(ConfigError, match="does not fit this configuration"):
        load_text_encoder(CLIPText(vocab_size=len(tokenizer), layers=2, **SIZE), str(tmp_path / "other"))


def test_a_run_starts_from_published_weights_and_keeps_them(tmp_path):
    shards, run, _ = make_data(tmp_path)
    _, tokenizer = published_text(tmp_path / "clip", 1, "quick_gelu")
    text = {"_target_": "ldm.text.clip.CLIPText", "vocab_size": len(tokenizer), "layers": 1, **SIZE}
    settings = config(f"shards={shards}", f"checkpoint={run}", "max_steps=2", "model.cross_attention_dim=32")
    settings["text_encoder"] = {**text, "pretrained": str(tmp_path / "clip")}
    folder = find_checkpoint(train_run(settings, lambda digest: tmp_path / "run").path)
    kept = load_parts(folder)["text_encoder"]
    again = CLIPText(vocab_size=len(tokenizer), layers=1, **SIZE)
    load_text_encoder(again, str(tmp_path / "clip"))
    assert all(torch.equal(kept[k], v) for k, v in again.state_dict().items())
    assert json.loads((folder / "tokenizer/vocab.json").read_text())
