"""The Fréchet distance of two sets of features as if each were a Gaussian: FID, FD-DINOv2."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.metrics.distances.interval import GROUPS, Estimate, groups_of, left_out
from ldm.untrusted import shown

MOST_WIDE = 16_384  # features of a file of statistics: a covariance of 2 GiB


@dataclass(frozen=True)
class Moments:
    """mean (D,) and covariance (D,D), float64, of n vectors; n None where a file does not say it."""

    mean: Tensor
    covariance: Tensor
    n: int | None = None


def frechet(ours: Tensor, theirs: Tensor | Moments) -> Estimate:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Fréchet 1957; Heusel et al. 2017, Equation 6), with the unbiased
    covariances that everyone takes.

    ours, theirs: (N,D), (M,D) with N, M > D, or moments of which nothing is left out. The error is that of both
    samples, or of ours alone beside moments.
    """
    x = _Groups(ours)
    y = theirs if isinstance(theirs, Moments) else _Groups(theirs)
    first, second = x.all(), y if isinstance(y, Moments) else y.all()
    of_second, of_first = _root(second.covariance), _root(first.covariance)
    value = _distance(first, second, of_second)
    # Each group is left out beside the other side's root, which stays: one eigenvalue problem a group.
    without = [_double([_distance(m, second, of_second) for m in x.without()])]
    if not isinstance(y, Moments):
        without.append(_double([_distance(m, first, of_first) for m in y.without()]))
    return left_out(value, *without)


def _distance(first: Moments, second: Moments, root: Tensor) -> float:
    """root: of the second's covariance."""
    crossed = torch.linalg.eigvalsh(root @ first.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    return float(apart + first.covariance.trace() + second.covariance.trace() - 2 * crossed)


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class _Groups:
    """Sums over groups of vectors (N,D), from which the moments without one of them follow by subtraction."""

    def __init__(self, vectors: Tensor):
        vectors, group = vectors.double(), groups_of(len(vectors)).to(vectors.device)
        self.middle = vectors.mean(dim=0)  # sums of squares about it lose no digits
        parts = [vectors[group == g] - self.middle for g in range(GROUPS)]
        self.counts = [len(p) for p in parts]
        self.sums, self.squares = [p.sum(dim=0) for p in parts], [p.T @ p for p in parts]

    def all(self) -> Moments:
        return self._moments(sum(self.counts), torch.stack(self.sums).sum(dim=0), torch.stack(self.squares).sum(dim=0))

    def without(self) -> list[Moments]:
        n, total, squares = sum(self.counts), torch.stack(self.sums).sum(dim=0), torch.stack(self.squares).sum(dim=0)
        return [
            self._moments(n - self.counts[g], total - self.sums[g], squares - self.squares[g]) for g in range(GROUPS)
        ]

    def _moments(self, n: int, total: Tensor, squares: Tensor) -> Moments:
        mean = total / n
        covariance = (squares - n * torch.outer(mean, mean)) / (n - 1)
        return Moments(self.middle + mean, covariance, n)


def read_moments(path: str | Path, width: int) -> Moments:
    """Statistics as pytorch-fid, ADM and EDM publish them: an .npz with mu (D,) and sigma (D,D).

    ConfigError for a file that is none, or of features of another width.
    """
    remedy = "Give an .npz with mu and sigma, as pytorch-fid and EDM write it, or reference=null for the data's own."
    try:
        with zipfile.ZipFile(path) as archive:  # bounded before numpy takes memory
            largest = max((i.file_size for i in archive.infolist() if i.filename in ("mu.npy", "sigma.npy")), default=0)
        if largest > MOST_WIDE**2 * 8 + 1024:
            raise ConfigError(
                f"reference={path} holds {largest / 2**30:.0f} GiB in one array, which no statistics are."
            )
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = np.asarray(file["mu"]), np.asarray(file["sigma"])
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"reference={path} holds no statistics ({shown(str(error))}). {remedy}") from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ConfigError(
            f"reference={path} is of features of another network: mu is {mean.shape}, sigma {covariance.shape}, and "
            f"these features are {width} wide. {remedy}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ConfigError(f"reference={path} holds numbers that are not finite. {remedy}")
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))
