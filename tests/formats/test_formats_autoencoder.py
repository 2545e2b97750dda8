"""Autoencoders alone, and the units of latents: folded into the 1x1 convolutions where a format has one number."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from format_checks import same
from safetensors.torch import save_file

from ldm.autoencoders.kl import AutoencoderKL
from ldm.checkpoints.pretrained import load_autoencoder
from ldm.errors import ConfigError
from ldm.formats import fold, published
from ldm.formats.checkpoint import Stored, kind, read, write
from ldm.formats.keys import vae as vae_keys

SIZES = dict(in_channels=3, latent_channels=4, block_channels=[16, 32], layers_per_block=1, norm_groups=8)
NODE = {"_target_": "ldm.autoencoders.kl.AutoencoderKL", **SIZES, "mid_attention": True}


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    made = AutoencoderKL(**SIZES).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.latents.set(0.0, 1 / 0.18215)
    return made


def checkpoint_of(autoencoder) -> Stored:
    return Stored({"autoencoder": NODE}, {"vae": {k: v.clone() for k, v in autoencoder.state_dict().items()}})


@pytest.mark.parametrize("spelling", ["bare", "prefixed", "diffusers", "ckpt", "folder"])
def test_an_autoencoder_alone_is_read_in_every_spelling(tmp_path, autoencoder, spelling):
    checkpoint = checkpoint_of(autoencoder)
    write(checkpoint, tmp_path / "folder", "diffusers")
    write(checkpoint, tmp_path / "bare.safetensors", "compvis")
    ours = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith("latents.")}
    theirs = vae_keys.to_compvis(ours)
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(3)}
    save_file(ours, tmp_path / "diffusers.safetensors")
    save_file({f"first_stage_model.{k}": v for k, v in theirs.items()}, tmp_path / "prefixed.safetensors")
    torch.save({"state_dict": theirs | training, "global_step": 840001}, tmp_path / "ckpt.ckpt")
    path = next(p for p in tmp_path.iterdir() if p.stem == spelling)
    assert kind(path) == "vae"
    for config in ([None] if spelling in ("bare", "folder") else []) + [tmp_path / "folder"]:
        found = read(path, config=config)
        assert found.config["autoencoder"] == NODE and set(found.states) == {"vae"}
        assert same(checkpoint.states["vae"], found.states["vae"])


def test_a_published_autoencoder_file_needs_no_config_but_says_what_is_assumed(tmp_path, autoencoder, monkeypatch):
    monkeypatch.setitem(published.AUTOENCODERS, ((16, 32), 4), {"norm_groups": 8})
    monkeypatch.setattr(published, "AUTOENCODER", (16, 32))
    write(checkpoint_of(autoencoder), tmp_path / "x.ckpt", "compvis")
    with pytest.warns(UserWarning, match=r"scaling factor: 0.18215, Stable Diffusion's, is taken"):
        found = read(tmp_path / "x.ckpt")
    assert same(found.states["vae"], autoencoder.state_dict())
    fresh = AutoencoderKL(**SIZES)
    with pytest.warns(UserWarning, match="scaling factor"):
        load_autoencoder(fresh, str(tmp_path / "x.ckpt"))  # autoencoder.pretrained= takes such a file too
    assert same(fresh.state_dict(), autoencoder.state_dict()) and fresh.latents.measured
    monkeypatch.setattr(published, "AUTOENCODER", (0,))  # another published first stage: nobody says its units
    assert read(tmp_path / "x.ckpt").states["vae"]["latents.scale"].isnan().all()


@pytest.mark.parametrize("format", ["diffusers", "compvis"])
def test_standardised_latents_leave_as_one_scaling_factor(tmp_path, autoencoder, format):
    mean, scale = torch.tensor([0.5, -2.0, 0.0, 1.0]), torch.tensor([0.5, 3.0, 1.0, 8.0])
    autoencoder.latents.set(mean, scale)
    path = tmp_path / "vae" if format == "diffusers" else tmp_path / "vae.safetensors"
    write(checkpoint_of(autoencoder), path, format)
    again = AutoencoderKL(**SIZES).eval()
    again.load_state_dict(read(path).states["vae"])
    images, x0 = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    close = dict(atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        mine, theirs = autoencoder.encode(images), again.encode(images)
        torch.testing.assert_close(
            again.latents.standardise(theirs.mean), autoencoder.latents.standardise(mine.mean), **close
        )
        spread = 2 * scale.log()[:, None, None] + 2 * torch.tensor(0.18215).log()
        torch.testing.assert_close(theirs.logvar, mine.logvar - spread, **close)
        picture = autoencoder.decode(autoencoder.latents.restore(x0))
        torch.testing.assert_close(again.decode(again.latents.restore(x0)), picture, **close)
        if format == "diffusers":
            other = diffusers.AutoencoderKL.from_pretrained(path)
            assert other.config.scaling_factor == 0.18215
            torch.testing.assert_close(other.decode(x0 / other.config.scaling_factor).sample, picture, **close)


@pytest.mark.parametrize("factor", [0.18215, 0.13025, 0.3611, 1.0, 1 / 3, 2.0])
def test_one_scale_for_all_channels_is_written_as_it_was_read(tmp_path, autoencoder, factor):
    autoencoder.latents.set(0.0, 1 / factor)
    write(checkpoint_of(autoencoder), tmp_path / "vae", "diffusers")
    said = json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"]
    assert said == factor if len(str(factor)) < 9 else abs(said / factor - 1) < 1e-7
    assert same(read(tmp_path / "vae").states["vae"], autoencoder.state_dict())  # bit for bit: nothing was folded


def test_units_that_nobody_measured_are_not_written(autoencoder, tmp_path):
    autoencoder.latents.set(float("nan"), float("nan"))
    with pytest.raises(ConfigError, match="latents have no mean and scale yet"):
        write(checkpoint_of(autoencoder), tmp_path / "vae", "diffusers")
    assert not list(tmp_path.iterdir())


def test_the_shift_of_a_folder_is_the_latents_mean(autoencoder, tmp_path):
    write(checkpoint_of(autoencoder), tmp_path / "vae", "diffusers")
    config = json.loads((tmp_path / "vae/config.json").read_text()) | {"shift_factor": 0.0609, "scaling_factor": 1.5305}
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    state = read(tmp_path / "vae").states["vae"]
    assert torch.equal(state["latents.mean"], torch.full((4,), 0.0609))
    assert torch.equal(state["latents.scale"], torch.full((4,), 1 / 1.5305))
    assert fold.scaling_factor(state) is None  # a mean needs folding


@pytest.mark.parametrize("kind_", ["scaled_linear", "linear"])
def test_the_ends_of_a_noise_table_are_read_off_it(kind_):
    config = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule=kind_, num_train_timesteps=700)
    betas = diffusers.DDPMScheduler(**config).betas
    found = published.table(betas)
    assert {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in config.items()} == found
    with pytest.raises(ConfigError, match=r"noise table \(700 betas, .*neither linear nor scaled_linear"):
        published.table(betas * torch.linspace(1, 2, 700))


@pytest.mark.parametrize("attention", [[], [4]])
def test_autoencoder_names_are_a_bijection_with_attention_at_levels_too(attention):
    levels, state = 5, {}
    for half, blocks, count in (("encoder", "down_blocks", 2), ("decoder", "up_blocks", 3)):
        for i in range(levels):
            for j in range(count):
                state[f"{half}.{blocks}.{i}.resnets.{j}.conv_shortcut.weight"] = torch.randn(4, 4, 1, 1)
                if (i if half == "encoder" else levels - 1 - i) in attention:
                    for leaf in ("to_q.weight", "to_out.0.weight"):
                        state[f"{half}.{blocks}.{i}.attentions.{j}.{leaf}"] = torch.randn(4, 4)
        state[f"{half}.mid_block.attentions.0.to_v.weight"] = torch.randn(4, 4)
    theirs = vae_keys.to_compvis(state)
    assert len(theirs) == len(state) and same(state, vae_keys.from_compvis(theirs))
    assert torch.equal(
        theirs["decoder.up.3.block.2.nin_shortcut.weight"], state["decoder.up_blocks.1.resnets.2.conv_shortcut.weight"]
    )
    if attention:
        ours = state["decoder.up_blocks.0.attentions.2.to_out.0.weight"]
        assert torch.equal(theirs["decoder.up.4.attn.2.proj_out.weight"], ours[:, :, None, None])
        assert torch.equal(
            theirs["encoder.down.4.attn.1.q.weight"][..., 0, 0], state["encoder.down_blocks.4.attentions.1.to_q.weight"]
        )
