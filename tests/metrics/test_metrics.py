"""Metrics: the reader is right on true pictures, at chance on others' captions; distances and intervals are exact."""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.sources import shapes as source
from ldm.features.vgg import LPIPS
from ldm.metrics import shapes
from ldm.metrics.nearest import NearestTraining
from ldm.metrics.perceptual import PerceptualReconstruction
from ldm.metrics.reconstruction import PSNR_MAX, Reconstruction
from ldm.metrics.shapes import WORDS, ShapeScore, wilson


@cache
def renders(image_size, n, split="train"):
    """(n, 3, H, W) in [-1, 1] and captions."""
    pictures = [source.ShapesSource(image_size=image_size).picture(split, i) for i in range(n)]
    pixels = torch.from_numpy(np.stack([p for p, _ in pictures])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, [source.caption(a) for _, a in pictures]


def score(images, captions):
    metric = ShapeScore()
    for start in range(0, len(captions), 250):
        metric.update(images[start : start + 250], captions[start : start + 250])
    return metric.compute()


def blurred(images, taps):
    kernel = torch.tensor(taps) / sum(taps)
    kernel = (kernel[:, None] * kernel)[None, None].repeat(3, 1, 1, 1)
    return F.conv2d(F.pad(images, (len(taps) // 2,) * 4, mode="replicate"), kernel, groups=3)


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("split", ["train", "unseen"])
def test_true_renders_are_right(image_size, split):
    result = score(*renders(image_size, 400, split))
    assert all(result[name] >= 0.99 for name in [*WORDS, "colour_and_shape", "all"]), result
    assert result["n"] == result["all/n"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [32, 64])
def test_two_thousand_true_renders_are_right(image_size):
    result = score(*renders(image_size, 2000))
    assert all(result[name] >= 0.995 for name in [*WORDS, "all"]), result


@pytest.mark.parametrize(
    "taps, psnr", [([1.0], 28), ([1.0], 24), ([1.0, 2.0, 1.0], 30), ([1.0, 4.0, 6.0, 4.0, 1.0], 30)]
)
def test_blur_and_noise_of_an_autoencoder_do_not_matter(taps, psnr):
    images, captions = renders(32, 400)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    worse = (blurred(images, taps) + 2 * 10 ** (-psnr / 20) * noise).clamp(-1, 1)
    result = score(worse, captions)
    assert all(result[name] >= 0.98 for name in [*WORDS, "all"]), result


def test_shuffled_captions_are_at_chance():
    images, captions = renders(32, 400)
    result = score(images, captions[17:] + captions[:17])
    for name in [*WORDS, "all"]:
        error = math.sqrt(result[f"{name}/chance"] / 400)
        assert abs(result[name] - result[f"{name}/chance"]) < 4 * error, (name, result[name])
    assert result["all/chance"] == pytest.approx(1 / 1600)


def test_pictures_without_a_figure_are_wrong():
    captions = renders(32, 400)[1]
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(100, 3, 32, 32, generator=draw) * 2 - 1
    blobs = F.interpolate(torch.randn(100, 3, 5, 5, generator=draw), size=32, mode="bicubic").clamp(-1, 1)
    for images in (torch.ones(100, 3, 32, 32), torch.zeros(100, 3, 32, 32), noise, blobs):
        result = score(images, captions[:100])
        assert result["shape"] == 0 and result["all"] == 0 and result["colour"] <= 0.02


def test_two_figures_are_none_and_an_ellipse_is_no_circle():
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    disc = x**2 + y**2 < 64
    ellipse = (x / 11) ** 2 + (y / 6) ** 2 < 1
    two = ((x - 8) ** 2 + y**2 < 36) | ((x + 8) ** 2 + y**2 < 36)
    masks = torch.stack([disc, ellipse, two]).float()[:, None]
    images = 1 - masks * torch.tensor([0.1, 1.8, 1.8]).view(1, 3, 1, 1)
    assert shapes.read(images)["shape"].tolist() == [WORDS["shape"].index("circle"), shapes.NONE, shapes.NONE]


def test_turning_does_not_change_the_shape():
    figures = shapes._textbook_figures(64)[:, None]
    for degrees in range(0, 90, 13):
        turn = math.radians(degrees)
        matrix = torch.tensor([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0]])
        grid = F.affine_grid(1.3 * matrix.repeat(5, 1, 1), [5, 1, 64, 64], align_corners=False)
        turned = F.grid_sample(figures, grid, align_corners=False)[:, 0]
        assert shapes.shape_distances(turned).argmin(dim=1).tolist() == [0, 1, 2, 3, 4]


def test_what_a_caption_does_not_mention_is_not_scored():
    images, captions = renders(32, 20)
    result = score(images, [f"one {source.attributes(c)['colour']} thing" for c in captions])
    assert result["colour"] == result["all"] == 1 and result["colour/n"] == 20
    assert math.isnan(result["place"]) and result["place/n"] == 0
    assert shapes.words("A Gray cat in the middle") == {"background": 1, "place": 0}


@pytest.mark.parametrize(
    "right, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)  # 81 of 263: Newcombe 1998, table I


def test_nearest_distance_is_zero_for_copies_and_exact_otherwise():
    images, _ = renders(32, 200)
    metric = NearestTraining(chunk=64)
    metric.add_reference(images[:150])
    metric.update(images[40:60])
    copies = metric.compute()
    assert copies["q95"] < 1e-6 and copies["n"] == 20
    metric.reset()
    metric.update(images[150:180])
    metric.update(images[180:])
    unit = (images / 2 + 0.5).flatten(1).double()
    expected = torch.cdist(unit[150:], unit[:150]).min(dim=1).values / math.sqrt(unit.shape[1])
    result = metric.compute()
    assert result["median"] == pytest.approx(expected.quantile(0.5).item(), rel=1e-4)
    assert result["min"] == pytest.approx(expected.min().item(), rel=1e-4) and result["min"] > 0.01


def test_reconstruction_is_torchmetrics_averaged_over_pictures():
    target, _ = renders(32, 12)
    images = (target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    metric = Reconstruction()
    metric.update(images[:5], target[:5])
    metric.update(images[5:], target[5:])
    a, b = images / 2 + 0.5, target / 2 + 0.5
    psnr = torch.stack([PeakSignalNoiseRatio(data_range=1.0)(a[i : i + 1], b[i : i + 1]) for i in range(12)])
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)(a, b)
    result = metric.compute()
    assert result["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-5)
    assert result["psnr/se"] == pytest.approx((psnr.std() / math.sqrt(12)).item(), rel=1e-4)
    assert result["ssim"] == pytest.approx(ssim.item(), rel=1e-4) and result["n"] == 12
    exact = Reconstruction()
    exact.update(target, target)
    assert exact.compute()["psnr"] == pytest.approx(PSNR_MAX) and exact.compute()["ssim"] == pytest.approx(1, abs=1e-3)


def test_lpips_of_reconstructions_and_what_is_left_of_gradients():
    """Half the contrast is a quarter of the energy; the same pictures are at no distance, whatever the batches."""
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metric = PerceptualReconstruction()
    for part in pictures.split(2):
        metric.update(part / 2, part)
    found = metric.compute()
    assert found["gradient_energy"] == pytest.approx(0.25)
    assert found["lpips_random"] == pytest.approx(LPIPS()(pictures / 2, pictures).mean().item(), rel=1e-5)
    metric.reset()
    metric.update(pictures, pictures)
    assert metric.compute() == {"lpips_random": 0.0, "lpips_random/se": 0.0, "gradient_energy": 1.0}
