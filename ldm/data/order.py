"""Which sample stands where in an epoch: pure functions of (seed, epoch, n, geometry), nothing else."""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """How a global batch is cut: per rank and micro-batch, times accumulation, times ranks."""

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    def steps(self, n: int) -> int:
        """Optimizer steps in an epoch of n samples: at least one, a small data set is repeated to fill it."""
        return max(n // self.global_batch, 1)

    def batches(self, n: int) -> int:
        """Micro-batches of one rank in an epoch: the same number on every rank, by construction."""
        return self.steps(n) * self.accumulate

    def rows(self, batch: int) -> slice:
        """The rank's share of micro-batch `batch` in the epoch's order: 2 ranks are 1 rank accumulating 2.

        Counted from the first micro-batch of a step, it is its place in the global batch.
        """
        start = (batch * self.world_size + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of n samples that (seed, epoch) names: Philox, so that it is the same on every machine."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


def epoch_order(seed: int, epoch: int, n: int, length: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(index, pass) of each position of an epoch of `length` positions.

    With length <= n it is the start of the epoch's own permutation and the pass is the epoch. A data set
    smaller than one global batch is read in endless passes, and the epoch takes its stretch: every sample as often.
    """

    def one_pass(number: int) -> np.ndarray:
        return order(seed, number, n) if shuffle else np.arange(n)

    if length <= n:
        return one_pass(epoch)[:length], np.full(length, epoch)
    first, last = epoch * length // n, ((epoch + 1) * length - 1) // n
    stream = np.concatenate([one_pass(number) for number in range(first, last + 1)])
    passes = np.repeat(np.arange(first, last + 1), n)
    skip = epoch * length - first * n
    return stream[skip : skip + length], passes[skip : skip + length]


def uniforms(seed: int, purpose: str, *place: int) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1) that depend on (seed, purpose, place) alone: crops, flips, replacements.

    A hash and not a generator, because a new generator for each sample costs more than decoding a small image.
    """
    text = purpose.encode() + struct.pack(f"<Q{len(place)}q", seed % 2**64, *place)
    a, b, c, d = struct.unpack("<4Q", hashlib.blake2b(text, digest_size=32).digest())
    return a / 2**64, b / 2**64, c / 2**64, d / 2**64


def validation_share(names: list[bytes], fraction: float, most: int = 1024) -> np.ndarray:
    """A mask of the samples held out: those whose names hash lowest, so that the order of files does not matter.

    The nearest whole number, at most `most` and never all of them. Where the share is less than half a sample it is
    none: of few pictures every one is wanted for training.
    """
    mask = np.zeros(len(names), bool)
    count = min(round(len(names) * fraction), most, len(names) - 1)
    if count < 1:
        return mask
    hashes = np.array([int.from_bytes(hashlib.blake2b(n, digest_size=8).digest(), "little") for n in names], np.uint64)
    mask[np.argsort(hashes, kind="stable")[:count]] = True
    return mask
