"""Statistics of latents: white noise has none of them, fields that were made with some have just those."""

import math

import pytest
import torch

from ldm.metrics.latent_space import (
    autocorrelation,
    correlations,
    effective_channels,
    kurtosis,
    largest_correlation,
    snr_db,
    spectral_slope,
    spectrum,
    statistics,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fourier_field(n, channels, side, slope):
    """Periodic Gaussian fields whose power is frequency^slope."""
    k = torch.fft.fftfreq(side, d=1 / side)
    radius = (k[:, None].square() + k.square()).sqrt()
    amplitude = torch.where(radius > 0, radius, torch.inf) ** (slope / 2)
    amplitude[0, 0] = 0
    return torch.fft.ifft2(torch.fft.fft2(normal(n, channels, side, side)) * amplitude).real


def test_white_noise_has_no_structure():
    found = statistics(normal(256, 3, 16, 16), normal(256, 3, 16, 16, seed=1), torch.ones(256, 3, 16, 16))
    for name in ("correlation", "autocorrelation/1", "autocorrelation/2", "autocorrelation/4", "spectral_slope"):
        assert abs(found[name]) < 0.02, name
    assert abs(found["kurtosis"]) < 0.05 and abs(found["snr_db"]) < 0.05
    assert found["effective_channels"] == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("shape", [(16, 16), (8, 16), (15, 7)])
def test_white_noise_has_power_1_at_every_frequency(shape):
    frequencies, power = spectrum(normal(1024, 2, *shape))
    assert [round(2 * f) for f in frequencies.tolist()] == list(range(1, min(shape)))
    torch.testing.assert_close(power, torch.ones_like(power), rtol=0.06, atol=0)


@pytest.mark.parametrize("slope", [-1.0, -2.0, -3.0])
def test_the_slope_of_a_field_is_what_it_was_made_with(slope):
    """Of windows of a large field, as pictures are of the world."""
    window = fourier_field(64, 2, 128, slope)[..., :32, :32]
    assert spectral_slope(*spectrum(window)) == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize("slope", [-2.0, 1.0])
def test_the_slope_is_exact_where_cosines_are_independent(slope):
    k = torch.arange(8, dtype=torch.float64)
    waves = torch.cos(math.pi / 8 * k[:, None] * (k + 0.5)) * torch.where(k > 0, 0.5, 0.125**0.5)[:, None]
    amplitude = (k[:, None].square() + k.square()).clamp_min(0.5) ** (slope / 4)
    x = waves.mT @ (amplitude * normal(2048, 2, 8, 8)) @ waves
    assert spectral_slope(*spectrum(x)) == pytest.approx(slope, abs=0.04)


def test_a_wave_stands_at_its_cycles_a_picture_whatever_the_latents_size():
    for side in (16, 32):
        x = torch.cos(2 * math.pi * 3 * (torch.arange(side) + 0.5) / side).expand(1, 1, side, side)
        frequencies, power = spectrum(x)
        assert round(2 * float(frequencies[power.argmax()])) == 6 and power.max() > 0.99 * power.sum()


def test_a_ramp_has_its_power_at_low_frequencies():
    """It does not jump back at the border, as it would in a Fourier transform, where the slope would be -2."""
    assert spectral_slope(*spectrum(torch.arange(32.0).expand(1, 1, 32, 32))) < -3


def test_neighbours_of_a_chain_are_as_alike_as_they_were_made():
    noise, rho = normal(64, 2, 64, 64).double(), 0.7
    for axis in (2, 3):
        rows, made = noise.unbind(axis), []
        for row in rows:
            made.append(rho * made[-1] + (1 - rho**2) ** 0.5 * row if made else row)
        noise = torch.stack(made, axis)
    for lag in (1, 2, 4):
        assert autocorrelation(noise, lag) == pytest.approx(rho**lag, abs=0.02)
    assert math.isnan(autocorrelation(noise[..., :2, :2], 2))
    assert not math.isnan(autocorrelation(noise[..., :2, :], 2))


@pytest.mark.parametrize("rho", [0.0, 0.5, -0.9])
def test_correlated_channels_are_fewer(rho):
    a, b = normal(512, 2, 8, 8).unbind(1)
    x = torch.stack([a, rho * a + (1 - rho**2) ** 0.5 * b], dim=1)
    assert largest_correlation(x) == pytest.approx(abs(rho), abs=0.01)
    assert effective_channels(x) == pytest.approx(2 / (1 + rho**2), abs=0.01)


def test_copies_of_a_channel_are_one_and_a_dead_one_is_none():
    a = normal(16, 1, 8, 8)
    assert effective_channels(torch.cat([a, -2 * a, 3 * a], 1)) == pytest.approx(1)
    dead = torch.cat([a, torch.zeros_like(a)], 1)
    assert effective_channels(dead) == pytest.approx(1) and largest_correlation(dead) == 0
    assert correlations(dead).tolist() == [[1, 0], [0, 1]]


def test_signal_to_noise_is_what_was_put_in():
    mean = 3 * normal(1024, 2, 8, 8) + 7
    variance = torch.tensor([0.09, 9.0])[:, None, None].expand(1024, 2, 8, 8)
    torch.testing.assert_close(snr_db(mean, variance), torch.tensor([20.0, 0.0]).double(), atol=0.1, rtol=0)
    assert snr_db(mean, torch.zeros(())[None, None, None, None].expand(1024, 2, 8, 8)).tolist() == [math.inf] * 2


def test_kurtosis_of_known_laws():
    uniform = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.cat([normal(64, 1, 32, 32), uniform, (uniform > 0.5).float()], dim=1)
    torch.testing.assert_close(kurtosis(x), torch.tensor([0.0, -1.2, -2.0]).double(), atol=0.05, rtol=0)
