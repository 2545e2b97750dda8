"""The small denoiser's numbers: exact where the ideal denoiser is known, 0 on white noise, ranked as they must."""

import math

import pytest
import torch

from ldm.diffusion.exact import Gaussian, GaussianMixture
from ldm.diffusion.levels import Level
from ldm.training.probe import (
    Latents,
    decoded_jumps,
    gaussian_of,
    held_out_errors,
    nats_over_gaussian,
    scores,
    small_denoiser,
    train_denoiser,
)

LOG_SNR = torch.linspace(-16, 16, 321, dtype=torch.float64)


def field(n, seed=0, side=8):
    """Smooth Gaussian latents (n,2,side,side) of variance 1, and the eigenvalues of their covariance."""
    place = torch.arange(side, dtype=torch.float64)
    one = torch.exp(-(place[:, None] - place).square() / 8) + 0.01 * torch.eye(side)
    covariance = torch.kron(one, one) / one[0, 0] ** 2
    noise = torch.randn(n, 2, side * side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise @ torch.linalg.cholesky(covariance).mT
    return x.reshape(n, 2, side, side).float(), torch.linalg.eigvalsh(covariance)


def points(x):
    return Latents(x, torch.zeros_like(x))


def errors_of(train, held_out, steps):
    return held_out_errors(train_denoiser(points(train), steps, 0), gaussian_of(train), held_out, 0)


def gaussian_error(log_snr):
    return 1 / (1 + log_snr.exp())


def test_of_a_correlated_gaussian_the_gain_is_the_entropy_that_correlation_takes():
    """KL(N(0, S) || N(0, 1)) = -1/2 log det S, where S has variances 1."""
    _, eigenvalues = field(1)
    error = (eigenvalues / (1 + LOG_SNR.exp()[:, None] * eigenvalues)).mean(dim=1)
    gained = nats_over_gaussian(LOG_SNR, error, gaussian_error(LOG_SNR))
    assert gained == pytest.approx(-0.5 * float(eigenvalues.log().mean()), rel=1e-3)
    order = torch.randperm(len(LOG_SNR), generator=torch.Generator().manual_seed(0))
    assert nats_over_gaussian(LOG_SNR[order], error[order], gaussian_error(LOG_SNR)[order]) == pytest.approx(gained)


def test_of_a_mixture_the_gain_is_its_divergence_from_the_gaussian():
    a, s = 0.9, (1 - 0.81) ** 0.5  # at +-a, of variance 1 together
    mixture = GaussianMixture(torch.tensor([-a, a], dtype=torch.float64).view(2, 1, 1, 1), [s, s])
    errors, draws = [], torch.Generator().manual_seed(0)
    levels = LOG_SNR[::8]
    for log_snr in levels:
        alpha, sigma = (float((sign * log_snr).sigmoid().sqrt()) for sign in (1, -1))
        errors.append(mixture.irreducible_loss(Level(0.5, alpha, sigma, 0.0), 20000, draws).mean())
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    p = sum(torch.exp(-((x - m) ** 2) / (2 * s**2)) for m in (-a, a)) / (2 * s * math.sqrt(2 * math.pi))
    q = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    divergence = float(torch.trapezoid(p * (p / q).log(), x))
    middle = levels.abs() < 9  # beyond, both errors are the same but for the draws, which a large snr weighs
    gained = nats_over_gaussian(levels[middle], torch.stack(errors)[middle], gaussian_error(levels[middle]))
    assert gained == pytest.approx(divergence, abs=0.02) and divergence > 0.18


def test_an_untrained_denoiser_is_the_gaussian():
    """Its output is 0, so its jump is alpha x_t, as of whoever knows N(0, 1)."""
    normal = Gaussian(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    found = held_out_errors(small_denoiser(2, 0), normal, field(32)[0], 0)
    torch.testing.assert_close(found.error, found.gaussian_error)
    assert found.nats() == pytest.approx(0, abs=1e-4) and found.log_snr[0] > 5 and found.log_snr[-1] < -5
    assert found.loss() == pytest.approx(found.gaussian_loss())


def test_of_white_noise_nothing_is_learnt():
    x = torch.randn(4096, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = errors_of(x[:4064], x[4064:], 20)
    assert found.gaussian_loss() == pytest.approx(1, abs=0.05)
    assert found.loss() / found.gaussian_loss() == pytest.approx(1, abs=0.03)
    assert found.nats() == pytest.approx(0, abs=0.05)


@pytest.mark.slow
def test_a_smooth_space_ranks_before_one_of_shuffled_pixels():
    """The same pixels in another order hold the same information, and a network that looks at neighbours finds less.

    Nor does it find more than there is: -1/2 log det S.
    """
    x, eigenvalues = field(1024)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = x.flatten(2)[..., order].view_as(x)
    found = [errors_of(some[:992], some[992:], 40) for some in (x, shuffled)]
    assert found[0].loss() < 0.8 * found[1].loss()
    assert found[0].nats() > 1.5 * found[1].nats() > 0
    assert found[0].nats() < -0.5 * float(eigenvalues.log().mean())


def test_the_same_twice_and_other_seeds_differ():
    x, _ = field(64)
    weights = [torch.cat([p.flatten() for p in train_denoiser(points(x), 3, s).model.parameters()]) for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train_denoiser(points(field(8)[0]), 1, 0)
    assert torch.equal(torch.rand(3), expected)


def test_decoded_jumps_are_measured_against_pictures():
    def decode(x0):
        return (x0[:, :1].repeat(1, 3, 2, 2) / 4).clamp(-1, 1)

    x, _ = field(32)
    normal = Gaussian(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    found = decoded_jumps(small_denoiser(2, 0), normal, x, decode(x), decode, 0)
    assert found["none"] == pytest.approx(100) and found["jump"] == pytest.approx(found["gaussian"], abs=1e-3)
    assert 10 < found["jump"] < 30
    judged = scores(held_out_errors(small_denoiser(2, 0), normal, x, 0), found, numbers=128, pixels=256)
    assert judged["jump_psnr_lost"] == pytest.approx(100 - found["jump"])
    assert judged["jump_psnr_gained"] == pytest.approx(0, abs=1e-3) and judged["relative_loss"] == pytest.approx(1)
