"""Maximum mean discrepancies of two sets of features: KID, CMMD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.metrics.distances.interval import Estimate, left_out

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N,D), (M,D) -> (N,M)
CHUNK = 2048  # rows of a kernel matrix that are there at once


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x.y/D + 1)^3 (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, width: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 width^2)); width 10 for CLIP's vectors (Jayasumana et al. 2024, section 4)."""
    return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * width**2))


def discrepancy(x: Tensor, y: Tensor, kernel: Kernel, biased: bool = False) -> Estimate:
    """MMD^2 of (N,D) and (M,D), N and M at least 2 (Gretton et al. 2012, Equation 3; biased: Equation 5).

    The biased one counts each vector's likeness to itself, which is what CMMD's authors report; its `bias` is what
    that adds, so that `unlimited` is the unbiased estimate. The error is the jackknife's over single vectors.
    """
    x, y = x.double(), y.double()
    self_x, rows_x, cross_x, cross_y = _sums(x, y, kernel)
    self_y, rows_y = _own(y, kernel)
    n, m = len(x), len(y)
    within_x, within_y, across = rows_x.sum(), rows_y.sum(), cross_x.sum()
    term_x, term_y = within_x / (n * (n - 1)), within_y / (m * (m - 1))
    unbiased = term_x + term_y - 2 * across / (n * m)
    without = []
    for rows, cross, size, other, rest in ((rows_x, cross_x, n, m, term_y), (rows_y, cross_y, m, n, term_x)):
        if size < 3:
            continue
        own = (rows.sum() - 2 * rows) / ((size - 1) * (size - 2))
        without.append(own + rest - 2 * (across - cross) / ((size - 1) * other))
    estimate = left_out(float(unbiased), *without)
    value = float(unbiased)
    if biased:
        value = float((within_x + self_x) / n**2 + (within_y + self_y) / m**2 - 2 * across / (n * m))
    return Estimate(value, estimate.error, value - float(unbiased))


def _own(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The sum of the kernel's diagonal, and of each row without it (N,)."""
    diagonal, rows = [], []
    for first in range(0, len(x), CHUNK):
        part = kernel(x[first : first + CHUNK], x)
        diagonal.append(part.diagonal(offset=first))
        rows.append(part.sum(dim=1) - diagonal[-1])
    return torch.cat(diagonal).sum(), torch.cat(rows)


def _sums(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of x itself, then the sums over the rows (N,) and the columns (M,) of the kernel between x and y."""
    rows, columns = [], torch.zeros(len(y), dtype=x.dtype, device=x.device)
    for first in range(0, len(x), CHUNK):
        part = kernel(x[first : first + CHUNK], y)
        rows.append(part.sum(dim=1))
        columns += part.sum(dim=0)
    return *_own(x, kernel), torch.cat(rows), columns
