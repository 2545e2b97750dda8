"""Randomness as a function of (seed, purpose, optimizer step, position in the global batch).

Never of rank, micro-batch or what was drawn before: a resumed run is the uninterrupted one, and two processes are one
process accumulating two.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class Ahead:
    """`normal`, whose next values a thread draws while a step is computed.

    A pure function's values may be made early: what was not guessed right is drawn when it is asked for.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "noise")
        self._begun: dict[str, tuple[tuple[Any, ...], Future[Tensor]]] = {}  # by purpose

    def normal(
        self, shape: Sequence[int], seed: int, purpose: str, place: tuple[int, range], following: tuple[int, range]
    ) -> Tensor:
        """Of the (step, positions) `place`; those of `following` are begun."""
        key, future = self._begun.pop(purpose, (None, None))
        asked = (tuple(shape), seed, purpose, *place)
        drawn = future.result() if future is not None and key == asked else normal(*asked)
        after = (tuple(shape), seed, purpose, *following)
        self._begun[purpose] = (after, self._thread.submit(normal, *after))
        return drawn


ahead = Ahead()
os.register_at_fork(after_in_child=lambda: ahead.__init__())  # type: ignore[misc]  # threads do not fork


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

    def positions(self, batch_index: int, n: int) -> range:
        """Positions in the global batch of a micro-batch of n samples."""
        first = self.rows(batch_index % self.accumulate).start
        return range(first, first + n)

    def following(self, step: int, positions: range) -> tuple[int, range]:
        """(step, positions) of this process's next micro-batch, as large as this one."""
        n = len(positions)
        first = positions.start + n * self.world_size
        if first >= n * self.accumulate * self.world_size:
            step, first = step + 1, n * self.rank
        return step, range(first, first + n)

    def normal(self, shape: Sequence[int], purpose: str, step: int, positions: Sequence[int]) -> Tensor:
        """`normal` of this seed. Of a stretch of positions, which training has, a thread begins the next one."""
        if not isinstance(positions, range):
            return normal(shape, self.seed, purpose, step, positions)
        return ahead.normal(shape, self.seed, purpose, (step, positions), self.following(step, positions))

    def reseed_layers(self, step: int, batch_index: int) -> None:
        """Seeds torch's global generator, which only dropout layers use, by the micro-batch's place in the step."""
        place = (batch_index % self.accumulate) * self.world_size + self.rank
        torch.manual_seed(seed_of(self.seed, "layers", step, place))
