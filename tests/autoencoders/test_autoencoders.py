"""The autoencoder is Stable Diffusion's, and standardised latents are standard exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conf_nodes import composed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from ldm.autoencoders.kl import AutoencoderKL
from ldm.autoencoders.latents import LatentSpace, Posterior
from ldm.build import build as build_node
from ldm.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"

ARCHITECTURES = {
    "like_sd": dict(block_channels=(32, 64, 64), layers_per_block=2, norm_groups=32, mid_attention=True),
    "one_layer_no_attention": dict(
        block_channels=(8, 16), layers_per_block=1, norm_groups=4, mid_attention=False, latent_channels=3
    ),
    "attention_at_two_levels": dict(
        block_channels=(8, 16, 24),
        layers_per_block=2,
        norm_groups=4,
        mid_attention=True,
        attention_levels=(False, True, True),
    ),
}


def pair(name: str) -> tuple[AutoencoderKL, torch.nn.Module]:
    diffusers = pytest.importorskip("diffusers")
    ours = ARCHITECTURES[name]
    flags = ours.get("attention_levels", [False] * len(ours["block_channels"]))
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(
        down_block_types=tuple("AttnDownEncoderBlock2D" if f else "DownEncoderBlock2D" for f in flags),
        up_block_types=tuple("AttnUpDecoderBlock2D" if f else "UpDecoderBlock2D" for f in reversed(flags)),
        block_out_channels=ours["block_channels"],
        layers_per_block=ours["layers_per_block"],
        norm_num_groups=ours["norm_groups"],
        mid_block_add_attention=ours["mid_attention"],
        latent_channels=ours.get("latent_channels", 4),
    ).eval()
    autoencoder = AutoencoderKL(**ours)
    result = autoencoder.load_state_dict(reference.state_dict(), strict=False)
    assert result.unexpected_keys == [] and all(key.startswith("latents.") for key in result.missing_keys)
    return autoencoder, reference


def tiny() -> AutoencoderKL:
    torch.manual_seed(0)
    return instantiate(OmegaConf.load(CONF / "autoencoder" / "kl_tiny.yaml"))


def posteriors(n: int = 3) -> list[Posterior]:
    """Batches of different sizes, with channels far from standard."""
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([0.1, 1.0, 5.0, 30.0]), torch.tensor([0.0, 3.0, -20.0, 100.0])
    batches = []
    for i in range(n):
        noise = torch.randn(2, i + 1, 4, 3, 5, generator=generator)
        mean = noise[0] * scale[:, None, None] + shift[:, None, None]
        batches.append(Posterior(mean, noise[1] - 1.0))
    return batches


# -- parity


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_diffusers(name: str) -> None:
    autoencoder, reference = pair(name)
    f = autoencoder.factor
    images = torch.rand(2, 3, 4 * f, 5 * f, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(images).latent_dist
        posterior = autoencoder.encode(images)
        torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-5, rtol=0)
        torch.testing.assert_close(posterior.kl(), expected.kl(), atol=1e-3, rtol=1e-5)
        z = posterior.mode()
        torch.testing.assert_close(autoencoder.decode(z), reference.decode(z).sample, atol=1e-5, rtol=0)


def test_published_size_builds_without_memory() -> None:
    with torch.device("meta"):
        autoencoder = AutoencoderKL()
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
    assert autoencoder.factor == 8 and autoencoder.last_layer.shape == (3, 128, 3, 3)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="28x40 or 32x40") as error:
        tiny().encode(torch.zeros(1, 3, 30, 40))
    assert "factor 4" in str(error.value)
    with pytest.raises(ConfigError, match="4x4 "):
        tiny().encode(torch.zeros(1, 3, 2, 4))


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"autoencoder\.norm_groups=8"):
        AutoencoderKL(block_channels=(8, 16), norm_groups=32)


def test_attention_flags_are_one_a_level() -> None:
    with pytest.raises(ConfigError, match="1 flags for 2 levels"):
        AutoencoderKL(block_channels=(8, 16), norm_groups=4, attention_levels=[True])


def test_autoencoder_learns() -> None:
    """Every parameter gets a finite gradient, and a few steps bring picture and reconstruction closer."""
    autoencoder = tiny()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    eps = torch.randn(4, 4, 2, 2, generator=generator)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        posterior = autoencoder.encode(images)
        loss = (autoencoder.decode(posterior.sample(eps)) - images).square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in autoencoder.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_gives_float32_moments() -> None:
    autoencoder = tiny()
    images = torch.zeros(1, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert autoencoder.encode(images).moments().dtype == torch.float32
    posterior = autoencoder.bfloat16().encode(images)
    assert posterior.mean.dtype == torch.float32 and autoencoder.decode(posterior.mode()).dtype == torch.bfloat16


# -- the posterior


def test_posterior_is_its_gaussian() -> None:
    posterior = posteriors()[2]
    again = Posterior.from_moments(posterior.moments())
    torch.testing.assert_close((again.mean, again.logvar), (posterior.mean, posterior.logvar), atol=0, rtol=0)
    eps = torch.randn_like(posterior.mean)
    torch.testing.assert_close(
        (posterior.sample(eps) - posterior.mode()) / eps, torch.exp(posterior.logvar / 2), atol=1e-3, rtol=1e-3
    )
    q = torch.distributions.Normal(posterior.mean, torch.exp(posterior.logvar / 2))
    exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), exact)


def test_posterior_variance_is_bounded() -> None:
    wild = Posterior(torch.zeros(1, 1, 1, 2), torch.tensor([-1e4, 1e4]).view(1, 1, 1, 2))
    assert wild.logvar.flatten().tolist() == [-30.0, 20.0]


# -- standardised latents


def test_standardised_latents_are_standard() -> None:
    """Mean 0 and standard deviation 1 in every channel, over images, pixels and the posterior's noise."""
    batches = posteriors()
    space = LatentSpace(4).double()
    space.measure(iter(batches))
    means = torch.cat([p.mean.double() for p in batches])
    variances = torch.cat([p.logvar.double().exp() for p in batches]) / space.scale[:, None, None] ** 2
    x0 = space.standardise(means)
    torch.testing.assert_close(x0.mean(dim=(0, 2, 3)), torch.zeros(4).double(), atol=1e-12, rtol=0)
    total = x0.var(dim=(0, 2, 3), correction=0) + variances.mean(dim=(0, 2, 3))
    torch.testing.assert_close(total, torch.ones(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(space.restore(x0), means, atol=1e-12, rtol=0)


def test_measuring_does_not_depend_on_batches() -> None:
    batches = posteriors()
    whole = Posterior(torch.cat([p.mean for p in batches]), torch.cat([p.logvar for p in batches]))
    one, many = LatentSpace(4), LatentSpace(4)
    one.measure([whole])
    many.measure(batches)
    torch.testing.assert_close((one.mean, one.scale), (many.mean, many.scale))


def test_measured_scale_is_that_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    posterior = Posterior(torch.randn(64, 2, 16, 16, generator=generator), torch.full((64, 2, 16, 16), -0.5))
    space = LatentSpace(2)
    space.measure([posterior])
    x0 = space.standardise(posterior.sample(torch.randn(64, 2, 16, 16, generator=generator)))
    assert x0.mean().abs() < 0.02 and (x0.std() - 1).abs() < 0.02


def test_unmeasured_latents_are_refused() -> None:
    space = tiny().latents
    assert not space.measured
    for function in (space.standardise, space.restore):
        with pytest.raises(ConfigError, match="module=autoencoder"):
            function(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ConfigError, match="empty"):
        space.measure([])
    space.set(0.0, 1 / 0.18215)
    assert space.measured
    torch.testing.assert_close(space.standardise(torch.ones(1, 4, 1, 1)), torch.full((1, 4, 1, 1), 0.18215))


def test_latent_space_travels_with_the_weights() -> None:
    measured, fresh = tiny(), tiny()
    measured.latents.measure(posteriors())
    fresh.load_state_dict(measured.state_dict(), strict=True)
    assert fresh.latents.measured
    torch.testing.assert_close(fresh.latents.scale, measured.latents.scale)
    fresh.load_state_dict(tiny().state_dict(), strict=True)
    assert not fresh.latents.measured


# -- the preview


def test_preview_recovers_a_linear_decoder() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        x0 = torch.randn(n, 4, 4, 6, generator=generator)
        small = torch.einsum("rc,bchw->brhw", weight, x0) + bias[:, None, None]
        texture = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 6)  # gone when averaged down by 2
        return x0, small.repeat_interleave(2, -1).repeat_interleave(2, -2) + texture

    space = LatentSpace(4)
    with pytest.raises(ConfigError, match="fit_preview"):
        space.preview(torch.zeros(1, 4, 2, 2))
    space.fit_preview(batch(n) for n in (2, 5))
    torch.testing.assert_close((space.preview_weight, space.preview_bias), (weight, bias), atol=1e-5, rtol=0)
    x0, images = batch(1)
    averaged = torch.nn.functional.avg_pool2d(images, 2).clamp(-1, 1)
    torch.testing.assert_close(space.preview(x0), averaged, atol=1e-5, rtol=0)


@pytest.mark.parametrize("file", sorted((CONF / "autoencoder").glob("*.yaml")), ids=lambda f: f.stem)
def test_parameter_counts_in_the_yaml_comments(file: Path) -> None:
    with torch.device("meta"):
        model = build_node(composed(f"autoencoder={file.stem}").autoencoder, "autoencoder")
    count = sum(p.numel() for p in model.parameters())
    assert f" {count:,} parameters" in file.read_text().splitlines()[0]
