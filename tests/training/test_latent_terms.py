"""Terms on latents and what happens to latents before they are decoded: by hand, and in runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from commands import here, metrics
from tiny_training import config, make_data
from vision import small_dinov2

from ldm.checkpoints.folder import find, load_parts
from ldm.errors import ConfigError
from ldm.training.losses.latent_alignment import LatentAlignment
from ldm.training.losses.perturbations import ChannelDropout, Equivariance, LatentNoise, Place
from ldm.training.losses.term import Reconstructed
from ldm.training.randomness import Draws
from ldm.training.run.build import build_module, build_parts
from ldm.training.run.fit import train_run

AUTOENCODER = ["module=autoencoder", "lr_scheduler=constant", "callbacks.reconstructions=null"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("latents"))[0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return small_dinov2(tmp_path_factory.mktemp("encoder") / "dinov2")


def place(step=0, batch=4, world_size=1, rank=0):
    draws = Draws(batch_size=batch, world_size=world_size, rank=rank, seed=7)
    return Place(draws, step, draws.positions(0, batch))


def pictures(n=4, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Latents:
    """Stands in for an autoencoder of C channels."""

    def __init__(self, channels):
        self.latents = type("L", (), {"mean": torch.zeros(channels)})


def aligned(term, z, images):
    return term(Reconstructed(images, images, images, z, 0))


def test_alignment_is_none_where_latents_are_the_tokens_up_to_a_rotation_and_a_scale(encoder):
    """Both margins are met; and by hand where they are not."""
    term, images = LatentAlignment(encoder, cosine_margin=0.0, distance_margin=0.0), pictures()
    term.bind(Latents(24))
    tokens = term.tokens(images / 2 + 0.5, 4, 4)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    term.projector.weight.data = rotation
    z = 3 * (tokens @ rotation).transpose(1, 2).reshape(4, 24, 4, 4)
    assert aligned(term, z, images).abs().max() < 1e-5
    z = torch.randn(4, 24, 4, 4, generator=torch.Generator().manual_seed(2))
    flat = z.flatten(2).transpose(1, 2)
    cosine = F.cosine_similarity(flat @ rotation.T, tokens, dim=-1)
    a, b = (F.normalize(v, dim=-1) for v in (flat, tokens))
    apart = (a @ a.mT - b @ b.mT).abs()
    for margins in ((0.5, 0.25), (0.0, 0.0)):
        term.cosine_margin, term.distance_margin = margins
        wanted = (1 - margins[0] - cosine).clamp_min(0).mean(1) + (apart - margins[1]).clamp_min(0).mean((1, 2))
        torch.testing.assert_close(aligned(term, z, images), wanted)


def test_equivariance_turns_and_scales_both_alike():
    """Latents that are their pictures' means stay so, whatever is drawn; all of a step are moved alike."""
    images, seen = pictures(size=64), set()
    z = F.avg_pool2d(images, 4)
    for step in range(40):
        moved, wanted = Equivariance(share=1.0)(z, images, place(step))
        assert wanted.shape[-1] == 4 * moved.shape[-1] and 32 <= wanted.shape[-1] <= 64
        if moved.shape == z.shape:
            quarters = next(k for k in (1, 2, 3) if torch.equal(moved, z.rot90(k, (2, 3))))
            assert torch.equal(wanted, images.rot90(quarters, (2, 3)))
        seen.add(moved.shape[-1])
        torch.testing.assert_close(moved.mean((2, 3)), wanted.mean((2, 3)), atol=0.03, rtol=0)
        other, _ = Equivariance(share=1.0)(z, images, place(step, world_size=2, rank=1))
        assert torch.equal(moved, other)
    assert len(seen) > 4
    still = [Equivariance(share=0.5)(z, images, place(step))[0] is z for step in range(200)]
    assert 80 < sum(still) < 120 and Equivariance(share=0.0)(z, images, place())[0] is z


def test_noise_has_the_deviation_that_was_asked_in_units_of_the_latents():
    """E sigma^2 = std^2 for sigma = |N(0, std^2)|; it is of the sample's place, not of the process."""
    n = 512
    z = 5 * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved, _ = LatentNoise(0.4)(z, z, place(batch=n))
    assert (moved - z).square().mean().sqrt().item() == pytest.approx(0.4 * z.std().item(), rel=0.1)
    whole, few = LatentNoise(0.4)(z[:4], z, place())[0], z[:4]
    halves = [Draws(batch_size=2, world_size=2, rank=rank, seed=7) for rank in range(2)]
    noises = [
        (LatentNoise(0.4)(few[:2], z, Place(d, 0, d.positions(0, 2)))[0] - few[:2]) / few[:2].std() for d in halves
    ]
    torch.testing.assert_close(torch.cat(noises), (whole - few) / few.std(), atol=1e-4, rtol=1e-4)


def test_dropped_channels_are_the_last_ones():
    n, z = 600, torch.ones(600, 6, 2, 2)
    moved, _ = ChannelDropout(share=0.5, least=2)(z, z, place(batch=n))
    kept = moved[:, :, 0, 0].sum(1).long()
    assert torch.equal(moved[:, :, 0, 0], (torch.arange(6) < kept[:, None]).float())
    counts = torch.bincount(kept, minlength=7)
    assert counts[:2].sum() == 0 and (counts[2:6] > 30).all()
    assert counts[6].item() == pytest.approx(n * (0.5 + 0.5 / 5), rel=0.15)


@pytest.mark.slow
def test_a_run_with_all_of_them_is_the_same_when_it_goes_on(shards, encoder, tmp_path):
    asked = [*AUTOENCODER, f"shards={shards}", "loss=[latent_alignment]", "callbacks.validation=null"]
    asked += ["perturbation=[equivariance,noise,channel_dropout]", f"module.losses.latent_alignment.encoder={encoder}"]
    whole = train_run(config(*asked, "max_steps=6"), lambda digest: tmp_path / "whole").path
    train_run(config(*asked, "max_steps=3"), lambda digest: tmp_path / "halves")
    halves = train_run(config(*asked, "max_steps=6"), lambda digest: tmp_path / "halves").path
    one, two = (load_parts(find(run), "raw") for run in (whole, halves))
    assert one.keys() == two.keys() == {"vae", "loss_latent_alignment"}
    assert all(torch.equal(one[part][k], two[part][k]) for part in one for k in one[part])
    assert set(one["loss_latent_alignment"]) == {"projector.weight"}
    assert {"train/latent_alignment", "train/latent_alignment_weight"} <= metrics(whole)[6].keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl_tiny", "vq_tiny"])
def test_a_decoder_alone_leaves_latents_and_their_units(shards, tmp_path, kind):
    """What was trained on them goes on as it did; pictures become better."""
    asked = [*AUTOENCODER, f"autoencoder={kind}", f"shards={shards}", "optimizer.lr=3e-3"]
    first = train_run(config(*asked, "max_steps=3"), lambda digest: tmp_path / "first").path
    tuned = [
        "max_steps=30",
        "module.train_parts=decoder",
        f"checkpoint={first}",
        "ema=decay",
        "callbacks.validation.every_n_steps=1",
    ]
    second = train_run(config(*asked, *tuned), lambda digest: tmp_path / "second").path
    before, after = (load_parts(find(run), "ema")["vae"] for run in (first, second))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    decoder = {k for k in before if k.startswith(("decoder.", "post_quant_conv."))}
    assert moved - {"latents.preview_weight", "latents.preview_bias"} == decoder
    rows = metrics(second)
    assert rows[30]["val/psnr"] > rows[1]["val/psnr"] and not any("train/kl" in row for row in rows.values())


def test_what_cannot_be_is_one_line(encoder, tmp_path):
    given = f"module.losses.latent_alignment.encoder={encoder}"
    cases = [
        (
            ["loss=[latent_alignment]", given, "module.train_parts=decoder"],
            "teaches the encoder, which module.train_parts",
        ),
        (["module.train_parts=decoders"], "module.train_parts='decoders'"),
        (["perturbation=[noise]", "module.perturbations.noise.std=-1"], "noise.std=-1"),
        (["perturbation=[equivariance]", "module.perturbations.equivariance.smallest=0"], "smallest=0"),
        (["perturbation=[channel_dropout]", "module.perturbations.channel_dropout.share=2"], "share=2"),
        (["loss=[latent_alignment]", given, "module.losses.latent_alignment.cosine_margin=3"], "cosine_margin=3"),
    ]
    for typed, said in cases[1:]:
        done = here("module=autoencoder", "autoencoder=kl_tiny", "shards=nowhere", *typed, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    values = config(*AUTOENCODER, "shards=nowhere", *cases[0][0])
    with pytest.raises(ConfigError, match=cases[0][1]):
        build_module(values, build_parts(values))
