"""Averages by powers of time: their widths, their recursion, and any length of them from snapshots of two."""

import math

import pytest
import torch
from torch import nn

from ldm.checkpoints.averages import average, coefficients, exponent, snapshots, write_snapshot
from ldm.errors import ConfigError
from ldm.training.ema import PowerEMA


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25, 0.28])
def test_a_length_is_the_deviation_of_its_profile(length):
    gamma = exponent(length)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = (gamma + 1) * tau**gamma / len(tau)
    mean = (p * tau).sum()
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert math.sqrt((p * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-5)


def test_published_exponents():
    """Section 3: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005) and exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.0, 0.29, -1.0, float("nan")])
def test_lengths_that_cannot_be(length):
    with pytest.raises(ConfigError, match="must lie in"):
        exponent(length)


def walk(steps, size=500):
    """Weights that drift and jitter, as training's do."""
    g = torch.Generator().manual_seed(0)
    drift, noise = torch.randn(size, generator=g), torch.randn(steps, size, generator=g)
    for t in range(1, steps + 1):
        yield drift * math.log(t + 10) + 0.3 * noise[t - 1] + torch.sin(torch.arange(size) + t / 100)


def test_any_length_is_rebuilt_from_snapshots_of_two(tmp_path):
    lengths = [0.03, 0.07, 0.15, 0.2]
    kept, direct, p = PowerEMA([0.05, 0.1]), PowerEMA(lengths), {"w": nn.Parameter(torch.zeros(500))}
    kept.start(p)
    direct.start(p)
    for t, w in enumerate(walk(2000), start=1):
        p["w"].data.copy_(w)
        kept.update(p)
        direct.update(p)
        if t == 1:
            assert torch.equal(kept.shadow["w"], w), "the weights before training count for nothing"
        if t % 100 == 0:
            for length, shadow in zip(kept.lengths, kept.shadows, strict=True):
                write_snapshot(tmp_path, t, length, shadow, torch.float32)
    assert len(snapshots(tmp_path)) == 40
    for length, shadow in zip(lengths, direct.shadows, strict=True):
        made = average(tmp_path, length, 2000)["w"]
        assert (made - shadow["w"]).norm() / shadow["w"].norm() < 1e-3, length
    for length, shadow in zip(kept.lengths, kept.shadows, strict=True):
        torch.testing.assert_close(average(tmp_path, length, 2000)["w"], shadow["w"], rtol=1e-5, atol=1e-5)
    weights = coefficients([(s.length, s.step) for s in snapshots(tmp_path)], 0.07, 2000)
    assert sum(weights) == pytest.approx(1, abs=1e-4)


def test_it_goes_on_from_its_state():
    p = {"w": nn.Parameter(torch.zeros(500))}
    whole, first = PowerEMA(), PowerEMA()
    whole.start(p)
    first.start(p)
    for t, w in enumerate(walk(20)):
        p["w"].data.copy_(w)
        whole.update(p)
        if t == 10:
            again = PowerEMA()
            again.load(first.state(), first.updates)
            again.load_more(first.more_state())
            again.start(p)
            first = again
        first.update(p)
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(whole.shadows, first.shadows, strict=True))
