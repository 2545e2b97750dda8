"""What a latent space is like before anything is trained on it: statistics of latents, pure functions of tensors.

N pictures, C channels, h x w latent pixels. Which of these numbers tells how well a second stage will do is an open
question: Skorokhodov et al. 2025 ("Improving the Diffusability of Autoencoders") look at spectra, Yao et al. 2025 and
Kouzelis et al. 2025 at other structure.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

LAGS = (1, 2, 4)  # latent pixels


def statistics(x0: Tensor, mean: Tensor, variance: Tensor) -> dict[str, float]:
    """One number each; all but snr_db, which is of posteriors, are of latents as diffusion sees them.

    x0 (N,C,h,w): standardised and sampled; mean, variance (N,C,h,w): of the posteriors, in any units.
    """
    frequencies, power = spectrum(x0)
    return {
        "snr_db": float(snr_db(mean, variance).mean()),
        "lowest_snr_db": float(snr_db(mean, variance).min()),
        "correlation": largest_correlation(x0),
        "effective_channels": effective_channels(x0),
        **{f"autocorrelation/{lag}": autocorrelation(x0, lag) for lag in LAGS},
        "spectral_slope": spectral_slope(frequencies, power),
        "kurtosis": float(kurtosis(x0).mean()),
    }


def snr_db(mean: Tensor, variance: Tensor) -> Tensor:  # (N,C,h,w), (N,C,h,w) -> (C,)
    """10 log10 of the variance of posteriors' means, over pictures and pixels, over the mean posterior variance.

    In dB; infinite where latents are points.
    """
    signal, noise = _by_channel(mean).var(dim=1, correction=0), _by_channel(variance).mean(dim=1)
    return 10 * (signal / noise).log10()


def correlations(x0: Tensor) -> Tensor:  # (N,C,h,w) -> (C,C) in [-1, 1]
    """Of channels, over pictures and pixels. A channel that never varies has none with others."""
    values = _standardised(x0)
    found = values @ values.mT / values.shape[1]
    return found.fill_diagonal_(1.0)


def largest_correlation(x0: Tensor) -> float:
    """The largest between two channels, in absolute value, in [0, 1]; 0 where there is one channel."""
    found = correlations(x0).abs()
    return float(found.fill_diagonal_(0.0).max())


def effective_channels(x0: Tensor) -> float:
    """Participation ratio (tr S)^2 / tr S^2 of the channels' covariance S, in [1, C] (Gao et al. 2017).

    C where channels are uncorrelated and equally wide, 1 where all are multiples of one.
    """
    values = _by_channel(x0)
    values = values - values.mean(dim=1, keepdim=True)
    covariance = values @ values.mT / values.shape[1]
    return float(covariance.trace() ** 2 / covariance.square().sum())


def autocorrelation(x0: Tensor, lag: int) -> float:
    """Correlation in [-1, 1] of pixels `lag` apart, the mean over channels and both directions; NaN where none are."""
    x = rearrange(_standardised(x0), "c (n h w) -> n c h w", n=len(x0), h=x0.shape[2])
    pairs = [(x[:, :, lag:], x[:, :, :-lag]), (x[..., lag:], x[..., :-lag])]
    found = [float((a * b).mean()) for a, b in pairs if a.numel()]
    return sum(found) / len(found) if found else math.nan


def spectrum(x0: Tensor) -> tuple[Tensor, Tensor]:  # (N,C,h,w) -> (K,), (K,)
    """Frequencies in cycles a picture's shorter side, about 1/2 to (min(h, w) - 1)/2, and the mean power around each.

    Of the orthonormal DCT-II, as in Skorokhodov et al. 2025: latents do not go on at the other side of a picture, and a
    Fourier transform would take that step for power at high frequencies. White noise of variance 1 has power 1.
    """
    height, width = x0.shape[-2:]
    side = min(height, width)
    x = _dct(height, x0) @ x0.double() @ _dct(width, x0).mT
    power = x.square().mean(dim=(0, 1))
    down, right = (torch.arange(n, dtype=torch.float64) * side / n for n in (height, width))
    radius = (down[:, None].square() + right.square()).sqrt()  # in half cycles
    rings = [radius.round() == r for r in range(1, side)]
    if not rings:
        return torch.zeros(2, 0, dtype=torch.float64).unbind()  # type: ignore[return-value]
    # The mean of log r, not the ring's number: the first ring's (1, 1) would make all spectra look flatter.
    frequencies = torch.stack([radius[ring].log().mean().exp() / 2 for ring in rings])
    return frequencies, torch.stack([power.cpu()[ring].mean() for ring in rings])


def spectral_slope(frequencies: Tensor, power: Tensor) -> float:
    """Least squares of log power against log frequency: 0 for white noise, about -2 for pictures' pixels.

    NaN for fewer than two frequencies.
    """
    if len(frequencies) < 2:
        return math.nan
    x, y = frequencies.log(), power.log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def kurtosis(x0: Tensor) -> Tensor:  # (N,C,h,w) -> (C,)
    """Excess kurtosis of each channel: 0 for a Gaussian, -2 for two points, large where few pixels are far out."""
    return _standardised(x0).pow(4).mean(dim=1) - 3


def _by_channel(x: Tensor) -> Tensor:  # (N,C,h,w) -> (C,Nhw) float64
    return rearrange(x, "n c h w -> c (n h w)").double()


def _standardised(x: Tensor) -> Tensor:  # (N,C,h,w) -> (C,Nhw), of mean 0 and variance 1; 0 where it never varies
    values = _by_channel(x)
    values = values - values.mean(dim=1, keepdim=True)
    return values / values.std(dim=1, correction=0, keepdim=True).clamp_min(1e-12)


def _dct(n: int, like: Tensor) -> Tensor:  # (n,n) float64, rows are frequencies of half cycles
    k, place = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64) + 0.5
    matrix = (2 / n) ** 0.5 * torch.cos(math.pi / n * k * place)
    matrix[0] /= 2**0.5
    return matrix.to(like.device)
