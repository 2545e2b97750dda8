"""Do the intervals hold the truth? 200 pairs of Gaussian samples a row, whose distances are known -> calibration.csv

python experiments/015_metrics/calibration.py
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ldm.metrics.distances.frechet import frechet
from ldm.metrics.distances.inception_score import inception_score
from ldm.metrics.distances.interval import Estimate
from ldm.metrics.distances.kernels import discrepancy, gaussian, polynomial
from ldm.metrics.distances.neighbours import density_coverage, precision_recall

REPETITIONS = 200
ROWS = [  # dimensions, vectors on either side, shift of the mean, how far the covariance is from the identity
    (4, 250, 0.5, 0.5),
    (16, 250, 0.0, 0.0),
    (16, 1000, 0.5, 0.3),
    (64, 500, 0.5, 0.3),
    (64, 2000, 0.25, 0.1),
]


def other(d: int, shift: float, apart: float) -> tuple[Tensor, Tensor]:
    """The second Gaussian: its mean, and a root of its covariance. The first is standard."""
    drawn = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) / math.sqrt(d)
    covariance = (1 - apart) * torch.eye(d) + apart * (drawn @ drawn.T + 0.1 * torch.eye(d))
    mean = torch.zeros(d, dtype=torch.float64)
    mean[0] = shift
    return mean, torch.linalg.cholesky(covariance.double())


def true_frechet(mean: Tensor, covariance: Tensor) -> float:
    roots = torch.linalg.eigvalsh(covariance).sqrt()
    return float(mean.square().sum() + len(mean) + covariance.trace() - 2 * roots.sum())


def true_polynomial(mean: Tensor, covariance: Tensor) -> float:
    """Of (x.y/D + 1)^3: the first three moments of x.y, from the moments of each side."""
    d = len(mean)
    one, none = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)

    def moments(m: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        third = torch.einsum("i,j,k->ijk", m, m, m)
        for pattern in ("i,jk->ijk", "j,ik->ijk", "k,ij->ijk"):
            third = third + torch.einsum(pattern, m, c)
        return m, c + torch.outer(m, m), third

    def expected(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
        first, second, third = ((x * y).sum() / d**power for power, (x, y) in enumerate(zip(a, b, strict=True), 1))
        return float(third + 3 * second + 3 * first + 1)

    p, q = moments(none, one), moments(mean, covariance)
    return expected(p, p) + expected(q, q) - 2 * expected(p, q)


def true_gaussian(mean: Tensor, covariance: Tensor, width: float) -> float:
    one = torch.eye(len(mean), dtype=torch.float64)

    def expected(m: Tensor, c: Tensor) -> float:  # of the kernel of a difference that is N(m, c)
        away = m @ torch.linalg.solve(width**2 * one + c, m)
        return float(torch.exp(-away / 2) / torch.linalg.det(one + c / width**2).sqrt())

    none = torch.zeros_like(mean)
    return expected(none, 2 * one) + expected(none, 2 * covariance) - 2 * expected(mean, one + covariance)


def measured(x: Tensor, y: Tensor) -> dict[str, Estimate]:
    fid = frechet(y, x)
    return {
        "frechet": fid,
        "frechet_infinity": fid.without_limit(),
        "kernel": discrepancy(y, x, polynomial),
        "gaussian_kernel": discrepancy(y, x, lambda a, b: gaussian(a, b, 4.0)),
        **precision_recall(y, x),
        **density_coverage(y, x),
        "inception_score": inception_score(2 * y),
    }


def bootstrapped(x: Tensor, y: Tensor, generator: torch.Generator, draws: int = 50) -> tuple[float, float]:
    """The usual percentile interval of the Fréchet distance, for comparison."""
    found = []
    for _ in range(draws):
        a = x[torch.randint(len(x), (len(x),), generator=generator)]
        b = y[torch.randint(len(y), (len(y),), generator=generator)]
        first, second = torch.cov(a.T), torch.cov(b.T)
        values, vectors = torch.linalg.eigh(first)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        crossed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
        found.append(float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def row(d: int, n: int, shift: float, apart: float) -> list[dict[str, object]]:
    mean, root = other(d, shift, apart)
    covariance = root @ root.T
    known: dict[str, Callable[[], float]] = {
        "frechet_infinity": lambda: true_frechet(mean, covariance),
        "kernel": lambda: true_polynomial(mean, covariance),
        "gaussian_kernel": lambda: true_gaussian(mean, covariance, 4.0),
    }
    generator = torch.Generator().manual_seed(0)
    all_: dict[str, list[Estimate]] = {}
    percentile = []
    for repetition in range(REPETITIONS):
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        y = torch.randn(n, d, generator=generator, dtype=torch.float64) @ root.T + mean
        for name, estimate in measured(x, y).items():
            all_.setdefault(name, []).append(estimate)
        if repetition < 40 and n <= 1000:
            percentile.append(bootstrapped(x, y, generator))
    made: list[dict[str, object]] = []
    truth_of_frechet = true_frechet(mean, covariance)
    for name, estimates in all_.items():
        average = sum(e.value for e in estimates) / REPETITIONS
        # Shares, scores and the distance of limited samples: what so many pictures give on average.
        truth = known[name]() if name in known else average
        held = sum(abs(e.value - truth) <= e.quantile * e.error for e in estimates) / REPETITIONS
        where = {"dimensions": d, "n": n, "shift": shift, "apart": apart, "measure": name}
        made.append({**where, "truth": f"{truth:.6g}", "known": name in known, "mean": f"{average:.6g}", "held": held})
    if percentile:
        held = sum(low <= truth_of_frechet <= high for low, high in percentile) / len(percentile)
        where = {"dimensions": d, "n": n, "shift": shift, "apart": apart, "measure": "frechet, percentile bootstrap"}
        middle = sum(low + high for low, high in percentile) / 2 / len(percentile)
        made.append({**where, "truth": f"{truth_of_frechet:.6g}", "known": True, "mean": f"{middle:.6g}", "held": held})
    return made


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for settings in ROWS:
        made = row(*settings)
        rows += made
        print(*(f"{r['measure']} {r['held']:.3f}" for r in made), sep="  ", flush=True)
    with (Path(__file__).parent / "calibration.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
