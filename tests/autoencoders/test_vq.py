"""The vector-quantised autoencoder: diffusers' numbers, straight-through gradients, one scale, and a training run."""

from __future__ import annotations

import pytest
import torch
from commands import metrics
from conf_nodes import build
from tiny_training import Spy, config, make_data, same_when_killed, train_watched
from torch import Tensor

import ldm.autoencoders.vq as vq
from ldm.autoencoders.latents import LatentSpace, Point
from ldm.autoencoders.vq import VQModel
from ldm.checkpoints.components import build_components
from ldm.checkpoints.load import load_any
from ldm.checkpoints.pretrained import load_autoencoder
from ldm.errors import ConfigError
from ldm.tasks.work.encode import encode_shards
from ldm.training.run.fit import train_run


def tiny(**changes) -> VQModel:
    torch.manual_seed(0)
    model = build("autoencoder", "vq_tiny", **changes)
    torch.nn.init.normal_(model.quantize.embedding.weight)  # apart, so that several codes are used
    return model


def pictures(n: int = 3, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("attention_levels", [None, (False, False, True)])
def test_equal_to_diffusers(attention_levels, tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers")
    flags = attention_levels or (False,) * 3
    torch.manual_seed(0)
    reference = diffusers.VQModel(
        down_block_types=tuple("AttnDownEncoderBlock2D" if f else "DownEncoderBlock2D" for f in flags),
        up_block_types=tuple("AttnUpDecoderBlock2D" if f else "UpDecoderBlock2D" for f in reversed(flags)),
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
    ).eval()
    torch.nn.init.normal_(reference.quantize.embedding.weight, std=0.3)
    ours = VQModel(block_channels=(8, 16, 24), codebook_size=32, norm_groups=4, attention_levels=attention_levels)
    reference.save_pretrained(tmp_path)
    load_autoencoder(ours, str(tmp_path))  # strict
    assert ours.latents.scale.tolist() == pytest.approx([1 / reference.config.scaling_factor] * 3)
    with torch.no_grad():
        z = ours.encode(pictures()).mode()
        torch.testing.assert_close(z, reference.encode(pictures()).latents, atol=1e-5, rtol=0)
        assert len(ours.quantize.nearest(z).unique()) > 2
        torch.testing.assert_close(ours.decode(z), reference.decode(z).sample, atol=1e-5, rtol=0)


def test_the_nearest_code_is_found_whatever_the_slices(monkeypatch) -> None:
    model, z = tiny(), torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = model.quantize.nearest(z)
    distances = (z[:, :, None] - model.quantize.embedding.weight.T[None, :, :, None, None]).square().sum(1)
    assert torch.equal(whole, distances.argmin(1))
    monkeypatch.setattr(vq, "LARGEST_TABLE", 3 * 256)
    assert torch.equal(model.quantize.nearest(z), whole)
    codes = model.quantize(whole)
    assert torch.equal(model.quantize.nearest(codes), whole), "a code is its own nearest"


def test_straight_through() -> None:
    """Decoding z is decoding its codes, and its gradient is theirs; the codebook gets none from the pictures."""
    model = tiny()
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codes = model.quantize(model.quantize.nearest(z)).detach().requires_grad_()
    weight = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out, direct = model.decode(z), model.decoder(model.post_quant_conv(codes))
    torch.testing.assert_close(out, direct, atol=1e-5, rtol=0)
    (out * weight).sum().backward()
    assert model.quantize.embedding.weight.grad is None
    (direct * weight).sum().backward()
    torch.testing.assert_close(z.grad, codes.grad, atol=1e-4, rtol=1e-4)


def test_the_regulariser_is_equation_3() -> None:
    """Codebook term with the codes' gradient only, commitment with the encoder's only, at its weight."""
    model = tiny(commitment=0.5, codebook_weight=2.0)
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    term, watched = model.regulariser(Point(z), kl_weight=1e9)
    assert tuple(watched) == model.regulariser_names and all(v.shape == (2,) for v in watched.values())
    indices = model.quantize.nearest(z)
    error = (model.quantize(indices) - z).detach()
    torch.testing.assert_close(term.detach(), 2.0 * 1.5 * error.square().mean((1, 2, 3)))
    term.sum().backward()
    torch.testing.assert_close(z.grad, -2.0 * 0.5 * 2 * error / error[0].numel())
    expected = torch.zeros(256, 3).index_add_(0, indices.flatten(), error.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(model.quantize.embedding.weight.grad, 2.0 * 2 * expected / error[0].numel())


def test_perplexity_counts_the_codes_in_use() -> None:
    codebook = tiny().quantize
    assert codebook.perplexity(torch.full((2, 4, 4), 7)).item() == pytest.approx(1)
    assert codebook.perplexity(torch.arange(256).view(4, 8, 8)).item() == pytest.approx(256, rel=1e-5)


def test_a_point_is_z_exactly_and_has_no_noise() -> None:
    z = (
        torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 5.0, 20.0])[:, None, None]
    )
    point = Point.from_moments(Point(z).moments())
    assert torch.equal(point.sample(torch.randn_like(z)), z) and torch.equal(point.mode(), z)
    assert Point(z.bfloat16()).mean.dtype == torch.float32
    space, each = LatentSpace(3, one_scale=True), LatentSpace(3)
    space.measure([point])
    each.measure([point])
    x0 = space.standardise(z)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.square().mean(), torch.tensor(1.0))
    assert space.scale.unique().numel() == 1 and each.scale.unique().numel() == 3
    torch.testing.assert_close(space.restore(x0), z, atol=1e-4, rtol=0)


def test_a_codebook_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="codebook_size=1 "):
        VQModel(codebook_size=1)


# -- through the trainer

STEPS = ["module=autoencoder", "autoencoder=vq_tiny", "batch_size=8", "optimizer.lr=5e-3", "lr_scheduler=constant"]
STEPS += ["callbacks.checkpoints.every_n_steps=3", "callbacks.validation.every_n_steps=3", "ema=none"]


def train(directory, shards, monkeypatch, spy, *overrides):
    return train_watched(config(*STEPS, f"shards={shards}", *overrides), directory, monkeypatch, spy)


@pytest.mark.slow
def test_a_run_learns_resumes_exactly_and_its_latents_are_diffused(tmp_path, monkeypatch) -> None:
    shards, _, _ = make_data(tmp_path)
    same_when_killed(lambda name, spy: train(tmp_path / name, shards, monkeypatch, spy, "max_steps=6"), tmp_path)

    sparse = ["callbacks.checkpoints.every_n_steps=1000", "callbacks.validation.every_n_steps=1000"]
    whole = train(tmp_path / "whole", shards, monkeypatch, Spy(), "max_steps=42", *sparse)  # goes on
    errors = [row["train/reconstruction"] for row in metrics(whole.path).values() if "train/reconstruction" in row]
    assert sum(errors[-6:]) < 0.5 * sum(errors[:6])  # two epochs each
    assert {"val/quantisation", "val/perplexity", "val/psnr"} <= whole.metrics.keys() and "val/kl" not in whole.metrics

    # z is cached, C numbers a pixel, and diffusion trains on it in the autoencoder's one scale.
    written = encode_shards(config(f"shards={shards}", f"checkpoint={whole.path}"), tmp_path / "vq_latents")
    parts = load_any(whole.path)
    assert parts.autoencoder.latents.scale.unique().numel() == 1
    with pytest.raises(ConfigError, match=r"set \+model\.in_channels=3"):
        build_components(config("autoencoder=vq_tiny"), device="meta")
    settings = config(
        *(f"shards={written.output}", "autoencoder=vq_tiny", "+model.in_channels=3", "+model.out_channels=3"),
        *("max_steps=2", "callbacks.validation.every_n_steps=2"),
    )
    assert train_run(settings, lambda digest: tmp_path / "diffusion").metrics["val/loss"] > 0
