"""task=latents: a row an autoencoder, the same numbers twice; what cannot be is one line."""

import csv
import json
import math
import shutil

import pytest
import torch
from commands import here
from PIL import Image
from tiny_training import config, make_data

from ldm.autoencoders.usage import shares, use
from ldm.checkpoints.components import build_components
from ldm.checkpoints.load import load_any
from ldm.checkpoints.save import save_any
from ldm.data.shards.splits import open_split
from ldm.errors import ConfigError
from ldm.evaluation.drawing import pictures_of
from ldm.pictures import MARGIN, reconstruction_rows, reconstruction_sheet
from ldm.tasks.work.latents import labels, listed
from ldm.training.run.fit import train_run

FEW = ["denoiser_steps=3", "denoiser_images=16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shards; "autoencoder" of Gaussians; "vq" of points that nobody has measured; "grey" of one channel.

    "alone": latents whose pictures are gone.
    """
    folder = tmp_path_factory.mktemp("latents")
    make_data(folder)
    common = ["module=autoencoder", f"shards={folder / 'shards'}", "max_steps=1", "callbacks.latent_statistics=null"]
    train_run(config(*common, "autoencoder=vq_tiny"), lambda digest: folder / "vq")
    grey = config("module=autoencoder", "autoencoder=vq_tiny", "+autoencoder.in_channels=1")
    save_any(build_components(grey, whole=False), folder / "grey", "ldm")
    shutil.copytree(folder / "latents", folder / "alone")
    for manifest in (folder / "alone").rglob("manifest.json"):
        manifest.write_text(manifest.read_text().replace(str((folder / "shards").resolve()), "/nowhere"))
    (folder / "empty").mkdir()
    return folder


def rows(folder):
    return list(csv.DictReader((folder / "latents.csv").open()))


@pytest.mark.slow
def test_two_autoencoders_are_two_rows_and_the_same_twice(made):
    asked = [f"checkpoint=[{made / 'autoencoder'},{made / 'vq'}]", f"shards={made / 'shards'}", *FEW]
    done = [here("task=latents", *asked, f"output={name}", cwd=made) for name in ("first", "second")]
    assert all(d.returncode == 0 for d in done), done[0].stderr + done[1].stderr
    assert "vq: its latents had no mean and scale, which were measured on 16 pictures" in done[0].stdout
    assert "autoencoder: its latents had no mean" not in done[0].stdout
    kl, vq = rows(made / "first")
    assert rows(made / "first") == rows(made / "second")
    assert [kl["autoencoder"], vq["autoencoder"]] == ["autoencoder", "vq"]
    assert kl["latents/channels"] == "4.0" and vq["latents/channels"] == "3.0" and kl["codebook/use"] == ""
    assert math.isinf(float(vq["latents/snr_db"])) and math.isfinite(float(kl["latents/snr_db"]))
    told = json.loads((made / "first/latents.json").read_text())
    assert told["spaces"]["vq"]["metrics"]["latents/snr_db"] == "inf"
    assert len(told["spaces"]["autoencoder"]["channels"]["snr_db"]) == 4
    for name in ("reconstructions-autoencoder", "reconstructions-vq", "spectra"):
        assert Image.open(made / f"first/{name}.png").size > (100, 100)


@pytest.mark.slow
def test_the_use_of_a_codebook_is_that_of_all_pictures_together(made):
    done = here(
        "task=latents", f"checkpoint={made / 'vq'}", f"shards={made / 'shards'}", *FEW, "batch_size=2", cwd=made
    )
    assert done.returncode == 0, done.stderr
    folder = made / done.stdout.strip().splitlines()[-1].removeprefix("latents: ")
    autoencoder = load_any(made / "vq").for_sampling().autoencoder
    pictures = torch.cat(list(pictures_of(open_split(made / "shards", "val"), 32)))
    codes = autoencoder.quantize.nearest(autoencoder.encode(pictures).mean)
    assert float(rows(folder)[0]["codebook/use"]) == pytest.approx(float(use(shares(codes, 256))))


@pytest.mark.slow
def test_pictures_that_are_judged_and_trained_on_are_remarked_on(made):
    done = here("task=latents", f"checkpoint={made / 'vq'}", f"shards={made / 'shards/train'}", *FEW, cwd=made)
    assert done.returncode == 0 and "too few pictures to hold some out" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("shards={}/shards", "needs shards=PATH"),
        ("checkpoint={}/vq", "needs shards=PATH"),
        ("checkpoint={}/vq shards={}/nowhere", "the data are not at"),
        ("checkpoint={}/vq shards={}/empty", "holds no .tar files"),
        ("checkpoint={}/nowhere shards={}/shards", "there is nothing at this path"),
        ("checkpoint=[{}/vq,{}/vq] shards={}/shards", "twice"),
        ("checkpoint={}/vq shards={}/shards image_size=2", "is larger than the pictures' 2: image_size=4 fits"),
        ("checkpoint={}/vq shards={}/shards image_size=30", "is no divisor of the pictures' 30: image_size=28 fits"),
        ("checkpoint={}/vq shards={}/shards denoiser_steps=0", "denoiser_steps=0: must be at least 1"),
        ("checkpoint={}/grey shards={}/shards", "is an autoencoder of 1 channels"),
        ("checkpoint={}/vq shards={}/alone", "their images are not at"),
    ],
)
def test_what_cannot_be_is_said(made, asked, said):
    done = here("task=latents", *asked.replace("{}", str(made)).split(), cwd=made)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_checkpoints_are_listed_and_named():
    assert listed("outputs/a") == ["outputs/a"] and listed("[outputs/a]") == ["outputs/a"]
    assert listed("[a, 'b,c' ,d]") == ["a", "b,c", "d"]
    assert labels(["x/a", "y/b"]) == ["a", "b"] and labels(["x/a", "y/a"]) == ["x/a", "y/a"]
    with pytest.raises(ConfigError, match="names none"):
        listed("[]")


def test_a_sheet_shows_what_is_lost_and_shares_nothing_between_pictures():
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 8, generator=draws) * 2 - 1
    z = torch.randn(3, 5, 2, 2, generator=draws)
    made = reconstruction_rows(images, images + 0.1, z)
    assert made.shape == (3, 8, 3, 8, 8)
    torch.testing.assert_close(made[:, 0], images)
    inside = images < 0.9
    torch.testing.assert_close(made[:, 2][inside], torch.full_like(images, 0.4)[inside])
    assert made[:, 3:].abs().amax(dim=(1, 2, 3, 4)).tolist() == [1, 1, 1]
    torch.testing.assert_close(made[:, 3, 0, ::4, ::4] * z.abs().amax(dim=(1, 2, 3))[:, None, None], z[:, 0])
    assert torch.equal(reconstruction_rows(images[1:2], images[1:2] + 0.1, z[1:2]), made[1:2])
    assert reconstruction_sheet(made).width == 3 * (96 + MARGIN) + MARGIN
    assert reconstruction_rows(images, images, torch.zeros(3, 40, 2, 2))[:, 2:].eq(0).all()
