"""Distances between sets of features: closed forms, formulas written out, and intervals that hold the truth."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ldm.errors import ConfigError
from ldm.metrics.distances.frechet import Moments, frechet, read_moments
from ldm.metrics.distances.inception_score import inception_score
from ldm.metrics.distances.interval import Estimate, groups_of, left_out
from ldm.metrics.distances.kernels import discrepancy, gaussian, polynomial
from ldm.metrics.distances.neighbours import density_coverage, precision_recall


def draws(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def exactly(vectors: torch.Tensor, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The same, with this sample mean and root @ root.T as its sample covariance."""
    centred = vectors - vectors.mean(dim=0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.T)).T)
    return white @ root.T + mean


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    d, n = 6, 200
    root = torch.eye(d, dtype=torch.float64) + 0.2 * draws(d, d, 1).tril()
    mean = torch.arange(d, dtype=torch.float64) / d
    x, y = (
        exactly(draws(n, d, 2), torch.zeros(d), torch.eye(d, dtype=torch.float64)),
        exactly(draws(n, d, 3), mean, root),
    )
    covariance = (root @ root.T).numpy()
    expected = mean.square().sum().item() + d + np.trace(covariance) - 2 * np.trace(sqrtm(covariance).real)
    assert frechet(x, y).value == pytest.approx(expected, rel=1e-9) == frechet(y, x).value
    moments = Moments(mean, torch.from_numpy(covariance))
    assert frechet(x, moments).value == pytest.approx(expected, rel=1e-9)
    assert frechet(x, moments).error < frechet(x, y).error
    assert frechet(x, x).value == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kernel", [polynomial, gaussian], ids=["polynomial", "gaussian"])
def test_the_discrepancy_is_its_double_sum_and_its_error_the_jackknife(kernel):
    x, y = draws(9, 5, 1), draws(7, 5, 2, shift=0.5)

    def unbiased(x, y):
        n, m = len(x), len(y)
        xx = sum(kernel(x[i : i + 1], x[j : j + 1]).item() for i in range(n) for j in range(n) if i != j)
        yy = sum(kernel(y[i : i + 1], y[j : j + 1]).item() for i in range(m) for j in range(m) if i != j)
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * kernel(x, y).mean().item()

    found = discrepancy(x, y, kernel)
    assert found.value == pytest.approx(unbiased(x, y), rel=1e-10)
    without_x = torch.tensor([unbiased(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(9)], dtype=torch.float64)
    without_y = torch.tensor([unbiased(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(7)], dtype=torch.float64)
    assert found.error == pytest.approx(left_out(found.value, without_x, without_y).error, rel=1e-9)
    biased = discrepancy(x, y, kernel, biased=True)
    assert biased.value == pytest.approx((kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()).item())
    assert biased.unlimited == pytest.approx(found.value, rel=1e-9)


def naive_neighbours(x: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """Written from the definitions, one pair at a time."""

    def radius(points: np.ndarray) -> list[float]:
        return [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]  # [0] is itself

    def far(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[np.linalg.norm(p - q) for q in b] for p in a])

    distance, of_real, of_x = far(x, real), np.array(radius(real)), np.array(radius(x))
    return {
        "precision": (distance < of_real).any(axis=1).mean(),
        "recall": (of_x > distance.T).any(axis=1).mean(),
        "density": (distance < of_real).sum() / (k * len(x)),
        "coverage": (distance.min(axis=0) < of_real).mean(),
    }


def test_neighbours_are_as_defined_also_without_a_group():
    x, real = draws(43, 4, 1, shift=0.4), draws(51, 4, 2)
    found = precision_recall(x, real, 3) | density_coverage(x, real, 3)
    expected = naive_neighbours(x.numpy(), real.numpy(), 3)
    assert {name: e.value for name, e in found.items()} == pytest.approx(expected)
    for name, estimate in found.items():
        parts = [
            [naive_neighbours(x[groups_of(43) != g].numpy(), real.numpy(), 3)[name] for g in range(10)],
            [naive_neighbours(x.numpy(), real[groups_of(51) != g].numpy(), 3)[name] for g in range(10)],
        ]
        again = left_out(estimate.value, *(torch.tensor(p, dtype=torch.float64) for p in parts))
        assert estimate.error == pytest.approx(again.error, rel=1e-9), name


def test_the_inception_score_of_sure_and_of_unsure_classifiers():
    sure = torch.eye(5).repeat(40, 1) * 100
    assert inception_score(sure).value == pytest.approx(5, rel=1e-6)  # five kinds, each certain
    assert inception_score(torch.zeros(200, 5)).value == pytest.approx(1, rel=1e-6)
    assert inception_score(sure).error == pytest.approx(0, abs=1e-6)


def test_intervals_hold_the_truth_and_one_without_bias_would_not():
    """40 repetitions at 32 dimensions; 200 of each distance are in experiments/015_metrics."""
    held = plain = 0
    truth = 32 * 0.1**2
    for seed in range(40):
        found = frechet(draws(500, 32, 2 * seed), draws(500, 32, 2 * seed + 1, shift=0.1))
        interval = found.without_limit().named("x")
        held += interval["x/low"] <= truth <= interval["x/high"]
        interval = found.named("x")
        plain += interval["x/low"] <= truth <= interval["x/high"]
    assert held >= 35 and plain == 0


def test_an_estimate_and_what_it_is_called():
    e = Estimate(1.0, 0.5, 0.75, 2.0)
    assert e.named("fid", 0.0) == {"fid": 1.0, "fid/low": 0.0, "fid/high": 2.0}
    assert e.named("share", 0.0, 1.0)["share/high"] == 1.0
    assert e.without_limit().named("fid_infinity") == {
        "fid_infinity": 0.25,
        "fid_infinity/low": -0.75,
        "fid_infinity/high": 1.25,
    }
    assert math.isclose(e.unlimited, 0.25)


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, None),
        ({"mu": np.zeros(4)}, "holds no statistics"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "of features of another network: mu is"),
        ({"mu": np.zeros(4), "sigma": np.full((4, 4), np.nan)}, "not finite"),
        ({"mu": np.array([object()] * 4), "sigma": np.eye(4)}, "holds no statistics"),
    ],
)
def test_published_statistics_are_read_as_data(tmp_path, arrays, said):
    np.savez(tmp_path / "stats.npz", **arrays)
    if said is None:
        assert torch.equal(read_moments(tmp_path / "stats.npz", 4).covariance, torch.eye(4, dtype=torch.float64))
        return
    with pytest.raises(ConfigError, match=said):
        read_moments(tmp_path / "stats.npz", 4)


def test_statistics_that_are_no_archive(tmp_path):
    (tmp_path / "stats.npz").write_bytes(b"mu and sigma")
    with pytest.raises(ConfigError, match="holds no statistics"):
        read_moments(tmp_path / "stats.npz", 4)
