"""VQ autoencoders in CompVis' and taming-transformers' files: the published key layout, both ways bit for bit."""

from __future__ import annotations

import pytest
import torch
from format_checks import conf, same
from safetensors.torch import load_file, save_file

from ldm.autoencoders.vq import VQModel
from ldm.checkpoints.load import load_any
from ldm.errors import ConfigError
from ldm.formats import published
from ldm.formats.checkpoint import Stored, kind, read, write
from ldm.formats.keys import vae as vae_keys
from ldm.formats.match import expected

SIZES = dict(in_channels=3, latent_channels=4, block_channels=[16, 32], layers_per_block=1, codebook_size=24)
NODE = {"_target_": "ldm.autoencoders.vq.VQModel", **SIZES, "mid_attention": True, "norm_groups": 8}


@pytest.fixture
def small_is_known(monkeypatch):
    """As if SIZES were a published first stage's, so that shapes are enough."""
    monkeypatch.setitem(published.AUTOENCODERS, ((16, 32), 4), {"norm_groups": 8})


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    made = VQModel(**SIZES, norm_groups=8).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def checkpoint_of(autoencoder) -> Stored:
    return Stored({"autoencoder": NODE}, {"vae": {k: v.clone() for k, v in autoencoder.state_dict().items()}})


def layout(z, multipliers, attends, codes, attention=True):
    """Names and shapes that the published code gives a VQ first stage of 128 channels and two resnets a level."""
    found = {"quantize.embedding.weight": (codes, z)}

    def conv(name, a, b, k=3):
        found.update({f"{name}.weight": (b, a, k, k), f"{name}.bias": (b,)})

    def norm(name, a):
        found.update({f"{name}.weight": (a,), f"{name}.bias": (a,)})

    def resnet(name, a, b):
        norm(f"{name}.norm1", a), conv(f"{name}.conv1", a, b), norm(f"{name}.norm2", b), conv(f"{name}.conv2", b, b)
        if a != b:
            conv(f"{name}.nin_shortcut", a, b, 1)

    def attend(name, a):
        norm(f"{name}.norm", a)
        for leaf in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{leaf}", a, a, 1)

    def middle(half, a):
        resnet(f"{half}.mid.block_1", a, a), resnet(f"{half}.mid.block_2", a, a)
        if attention:
            attend(f"{half}.mid.attn_1", a)

    widths, top = [128 * m for m in multipliers], len(multipliers) - 1
    conv("encoder.conv_in", 3, 128), conv("decoder.conv_in", z, widths[-1])
    conv("quant_conv", z, z, 1), conv("post_quant_conv", z, z, 1)
    a = 128
    for i, b in enumerate(widths):
        for j in range(2):
            resnet(f"encoder.down.{i}.block.{j}", a, b)
            a = b
            if i in attends:
                attend(f"encoder.down.{i}.attn.{j}", b)
        if i < top:
            conv(f"encoder.down.{i}.downsample.conv", b, b)
    middle("encoder", a), norm("encoder.norm_out", a), conv("encoder.conv_out", a, z), middle("decoder", a)
    for i, b in reversed(list(enumerate(widths))):
        for j in range(3):
            resnet(f"decoder.up.{i}.block.{j}", a, b)
            a = b
            if i in attends:
                attend(f"decoder.up.{i}.attn.{j}", b)
        if i:
            conv(f"decoder.up.{i}.upsample.conv", b, b)
    norm("decoder.norm_out", a), conv("decoder.conv_out", a, 3)
    return found


@pytest.mark.parametrize(
    ("name", "changes", "theirs"),
    [
        ("vq_f4", {}, layout(3, (1, 2, 4), (), 8192)),
        ("vq_f4", {"mid_attention": False}, layout(3, (1, 2, 4), (), 8192, attention=False)),
        ("vq_f8", {}, layout(4, (1, 2, 2, 4), (3,), 16384)),
        ("vq_f8", {"codebook_size": 256}, layout(4, (1, 2, 2, 4), (3,), 256)),
        ("vq_f16", {}, layout(8, (1, 1, 2, 2, 4), (4,), 16384)),
    ],
)
def test_the_published_layout(tmp_path, name, changes, theirs):
    node = conf("autoencoder", name) | changes
    node.pop("_convert_")
    assert {k: tuple(v.shape) for k, v in vae_keys.to_compvis(expected(node)).items()} == theirs
    torch.manual_seed(0)
    tensors = {k: torch.randn(1).half().repeat(shape) for k, shape in theirs.items()}
    torch.save({"state_dict": tensors | {"loss.discriminator.main.0.weight": torch.ones(1)}}, tmp_path / "x.ckpt")
    assert kind(tmp_path / "x.ckpt") == "vae"
    found = read(tmp_path / "x.ckpt")
    assert expected(found.config["autoencoder"]).keys() == expected(node).keys()
    assert found.config["autoencoder"]["codebook_size"] == node["codebook_size"]
    assert found.states["vae"]["latents.scale"].isnan().all()  # nobody says their units: they are measured
    back = vae_keys.to_compvis(found.states["vae"])
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v.float()) for k, v in tensors.items())


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_there_and_back_bit_for_bit(tmp_path, autoencoder, small_is_known, suffix):
    theirs = vae_keys.to_compvis(autoencoder.state_dict())
    save_file({f"first_stage_model.{k}": v for k, v in theirs.items()}, tmp_path / "first.safetensors")
    first = read(tmp_path / "first.safetensors")
    assert first.config["autoencoder"] == NODE
    assert same(autoencoder.state_dict(), first.states["vae"])
    path = tmp_path / f"second.{suffix}"
    write(first, path, "compvis")
    stored = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)["state_dict"]
    assert stored.keys() == theirs.keys() and all(torch.equal(stored[k], v) for k, v in theirs.items())
    second = load_any(path)
    assert same(autoencoder.state_dict(), second.autoencoder.state_dict())
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = autoencoder.encode(images).mode()
        assert torch.equal(second.autoencoder.decode(z), autoencoder.decode(z))


def test_measured_latents_leave_in_units_of_one_and_the_codebook_follows(tmp_path, autoencoder):
    autoencoder.latents.set(0.3, 1.7)
    write(checkpoint_of(autoencoder), tmp_path / "x.safetensors", "compvis")
    again = load_any(tmp_path / "x.safetensors").autoencoder
    assert torch.equal(again.latents.scale, torch.ones(4)) and torch.equal(again.latents.mean, torch.zeros(4))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours, theirs = (a.latents.standardise(a.encode(images).mode()) for a in (autoencoder, again))
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        one, other = (a.decode(a.latents.restore(ours)) for a in (autoencoder, again))
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_what_a_codebook_learns_from_stays_here(tmp_path, autoencoder):
    """A published file has codes alone; read for a run that goes on with averages, they begin from those."""
    node = {**NODE, "codebook_decay": 0.9, "revive_after": 3}
    moving = VQModel(**SIZES, norm_groups=8, codebook_decay=0.9, revive_after=3)
    moving.load_state_dict(moving.widened(autoencoder.state_dict()))
    moving.quantize.cluster_size.fill_(7)
    whole = Stored({"autoencoder": node}, {"vae": {k: v.clone() for k, v in moving.state_dict().items()}})
    write(whole, tmp_path / "moving.safetensors", "compvis")
    write(checkpoint_of(autoencoder), tmp_path / "plain.safetensors", "compvis")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("moving", "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    again = load_any(tmp_path / "moving.safetensors").autoencoder.quantize
    assert again.decay == 0.9 and again.cluster_size.eq(1).all() and again.unused.eq(0).all()
    assert torch.equal(again.cluster_sum, autoencoder.quantize.embedding.weight)


def test_what_these_files_cannot_be(tmp_path, autoencoder, sd1_folder):
    checkpoint = checkpoint_of(autoencoder)
    with pytest.raises(ConfigError, match=r"format=diffusers cannot carry autoencoder=ldm\.autoencoders\.vq\.VQModel"):
        write(checkpoint, tmp_path / "x", "diffusers")
    write(checkpoint, tmp_path / "x.safetensors", "compvis")
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match=r"block_channels=\[16, 32\].*no published ones"):
        read(tmp_path / "bare.safetensors")
    whole = read(sd1_folder)
    whole.config["autoencoder"], whole.states["vae"] = NODE, checkpoint.states["vae"]
    with pytest.raises(ConfigError, match=r"format=compvis cannot carry autoencoder=ldm\.autoencoders\.vq\.VQModel"):
        write(whole, tmp_path / "whole.safetensors", "compvis")
