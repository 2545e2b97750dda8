"""Randomness as a function of (seed, purpose, optimizer step, position in the global batch).

Never of rank, micro-batch or what was drawn before: a resumed run is the uninterrupted one, and two processes are one
process accumulating two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data.order import Geometry
from ldm.errors import ConfigError


def seed_of(*key: object) -> int:
    """A 63-bit seed for a key of integers and words, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def normal(shape: Sequence[int], seed: int, purpose: str, step: int, positions: Sequence[int]) -> Tensor:
    """Standard normal float32 on the CPU, (len(positions), *shape); one generator a sample."""
    out = torch.empty((len(positions), *shape))
    for row, position in zip(out, positions, strict=True):
        row.normal_(generator=generator(seed, purpose, step, position))
    return out


def uniform(seed: int, purpose: str, step: int, positions: Sequence[int]) -> Tensor:
    """(k + 0.5)/2^32 in float64: never 0, never 1. (len(positions),)"""
    draws = [(seed_of(seed, purpose, step, p) % 2**32 + 0.5) / 2**32 for p in positions]
    return torch.tensor(draws, dtype=torch.float64)


def stratified(seed: int, purpose: str, step: int, positions: Sequence[int], total: int) -> Tensor:
    """One draw in each of `total` equal strata of (0, 1), dealt to the positions by a permutation of this step."""
    permutation = torch.randperm(total, generator=generator(seed, purpose, "strata", step))
    offset = uniform(seed, purpose, step, [-1])
    return (permutation[list(positions)].double() + offset) / total


@dataclass(frozen=True)
class Draws(Geometry):
    """Which samples of the global batch this process sees, and the seed of random numbers for them."""

    seed: int = 0

    @classmethod
    def of(cls, data: Any, seed: int) -> Draws:
        """Draws for the batches of a datamodule, which says its `geometry`. ConfigError where it does not."""
        geometry = getattr(data, "geometry", None)
        if not isinstance(geometry, Geometry):
            raise ConfigError(
                f"{type(data).__name__} does not say how a global batch is cut, which random numbers depend on: train "
                "with datamodule=ShardDataModule(...), or give yours a property `geometry` (ldm.data.order.Geometry)."
            )
        return cls(**asdict(geometry), seed=seed)

    def positions(self, batch_index: int, n: int) -> list[int]:
        """Positions in the global batch of a micro-batch of n samples."""
        first = self.rows(batch_index % self.accumulate).start
        return list(range(first, first + n))

    def reseed_layers(self, step: int, batch_index: int) -> None:
        """Seeds torch's global generator, which only dropout layers use, by the micro-batch's place in the step."""
        place = (batch_index % self.accumulate) * self.world_size + self.rank
        torch.manual_seed(seed_of(self.seed, "layers", step, place))
