"""Averages over training of any length, made after it (Karras et al. 2024, Section 3 and Appendix C).

A run keeps two averages whose weight over time is a power of it, and writes snapshots of both. Each snapshot is a known
mixture of the weights of all steps; what mixture of snapshots is nearest to a wanted one is a least-squares problem.

    RUN/averages/step-00000500_0.05.safetensors     every trained tensor, as PART.NAME
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.atomic import atomic_write
from ldm.errors import ConfigError
from ldm.formats.files.open import load
from ldm.formats.files.store import save_tensors

LONGEST = 0.28  # a little below the flat average's, whose exponent is 0
_NAME = re.compile(r"step-(\d{8,15})_(0\.\d{1,6})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """One average at one step."""

    step: int
    length: float
    path: Path


def exponent(length: float) -> float:
    """The power gamma of time whose average is `length` wide: sigma_rel, the profile's deviation in units of training.

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (Equation 123), which falls with gamma. ConfigError
    outside (0, 0.28].
    """
    if not 0 < length <= LONGEST:
        raise ConfigError(f"an average's length={length} must lie in (0, {LONGEST}]: 0.05 to 0.2 are usual.")
    low, high = 0.0, 1.0
    while _length(high) > length:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _length(middle) > length else (low, middle)
    return (low + high) / 2


def _length(gamma: float) -> float:
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def coefficients(have: Sequence[tuple[float, int]], length: float, step: int) -> list[float]:
    """What each of the averages `have` (length, step) counts in the one nearest to `length` at `step`.

    Least squares between profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]; their products have a
    closed form (Algorithm 3). Other than there they must sum to 1, so that weights that stood still are found again:
    from few snapshots the result is 3 to 26 times as near.
    """
    profiles, wanted = [(exponent(n), float(s)) for n, s in have], (exponent(length), float(step))
    scale = 1 / step  # in units of training, so that the numbers stay near 1
    matrix = torch.tensor([[_product(a, b, scale) for b in profiles] for a in profiles], dtype=torch.float64)
    target = torch.tensor([*(_product(a, wanted, scale) for a in profiles), 1.0], dtype=torch.float64)
    n, bordered = len(profiles), torch.ones(len(target), len(target), dtype=torch.float64)
    bordered[:n, :n], bordered[n, n] = matrix, 0.0  # Lagrange's system of the minimum under that condition
    return torch.linalg.lstsq(bordered, target[:, None], driver="gelsd").solution[:n, 0].tolist()


def _product(a: tuple[float, float], b: tuple[float, float], scale: float) -> float:
    """The integral of two profiles' product."""
    (ga, ta), (gb, tb) = a, b
    ta, tb = ta * scale, tb * scale
    logarithm = (ga + gb + 1) * math.log(min(ta, tb)) - (ga + 1) * math.log(ta) - (gb + 1) * math.log(tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * math.exp(logarithm)


def write_snapshot(run: Path, step: int, length: float, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Keeps an average in a run directory."""
    with atomic_write(run / "averages" / f"step-{step:08d}_{length:g}.safetensors") as part:
        save_tensors(tensors, part, dtype=dtype)


def snapshots(run: Path) -> list[Snapshot]:
    """What a run directory has, oldest first. ConfigError where there is none."""
    found = []
    for path in sorted((run / "averages").glob("step-*.safetensors")):
        if named := _NAME.fullmatch(path.name):
            found.append(Snapshot(int(named[1]), float(named[2]), path))
    if not found:
        raise ConfigError(f"{run} has no snapshots of its averages: train with ema=power, which writes them.")
    return found


def average(run: Path, length: float, step: int) -> dict[str, Tensor]:
    """The average of a length at a step: float32 tensors by name. Reads one snapshot after another."""
    have = [s for s in snapshots(run) if s.step <= step]
    if not have:
        raise ConfigError(f"{run} has no snapshot up to step {step}: choose a later step.")
    made: dict[str, Tensor] = {}
    for weight, snapshot in zip(coefficients([(s.length, s.step) for s in have], length, step), have, strict=True):
        tensors = load(snapshot.path).tensors
        if made and {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in made.items()}:
            raise ConfigError(f"{snapshot.path} holds other tensors than the snapshots before it: delete it.")
        for name, tensor in tensors.items():
            made[name] = made[name].add_(tensor, alpha=weight) if name in made else tensor.float() * weight
    return made
