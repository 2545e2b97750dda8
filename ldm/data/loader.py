"""Loaders: an epoch is a pure function of (seed, epoch, geometry), so that a position is all there is to save."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ldm.data import order
from ldm.data.order import Geometry
from ldm.data.samples import Batches
from ldm.data.threads import in_order
from ldm.errors import ConfigError

REFUSE, RESTART = "exact", "restart_epoch"


class ThreadLoader:
    """Training batches for one rank, made by threads, handed over in order; every rank gets equally many.

    State is the epoch and the batches handed over (counted when they are, not when they are made). `__len__` exists
    because Lightning would otherwise fetch one batch ahead and lose it at a resume. Iterating again is the next epoch.
    """

    def __init__(
        self,
        batches: Batches,
        geometry: Geometry,
        seed: int = 0,
        threads: int = 2,
        prefetch: int = 4,
        shuffle: bool = True,
        resume: str = REFUSE,  # or restart_epoch: changed data restart the epoch instead of being refused
    ) -> None:
        self.batches, self.geometry, self.seed = batches, geometry, seed
        self.threads, self.prefetch, self.shuffle = threads, prefetch, shuffle
        self.n = len(batches.shards)
        if self.n == 0:
            raise ConfigError(f"{batches.shards.path} has no training samples. Give `shards=` another path.")
        if resume not in (REFUSE, RESTART):
            raise ConfigError(f"data.resume={resume}: there is {REFUSE} and {RESTART}.")
        self.resume = resume
        self.epoch, self.done, self._fresh = 0, 0, True

    def __len__(self) -> int:
        return self.geometry.batches(self.n)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # a generator: nothing moves before the first batch is asked for
        if not self._fresh or self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        self._fresh = False
        epoch = self.epoch
        length = self.geometry.global_batch * self.geometry.steps(self.n)
        indices, passes = order.epoch_order(self.seed, epoch, self.n, length, self.shuffle)

        def job(number: int) -> dict[str, Any]:
            rows = self.geometry.rows(number)
            return self.batches(indices[rows], passes[rows], range(rows.start, rows.stop))

        for batch in in_order(job, range(self.done, len(self)), self.threads, self.prefetch):
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain data, equal on all ranks (Lightning saves rank 0's only)."""
        return {
            "epoch": self.epoch,
            "batches": self.done,
            "seed": self.seed,
            "n": self.n,
            "batch_size": self.geometry.batch_size,
            "accumulate": self.geometry.accumulate,
            "world_size": self.geometry.world_size,
            "fingerprint": self.batches.shards.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch handed over, cut into other ranks and micro-batches if need be."""
        saved = Geometry(state["batch_size"], state["accumulate"], 0, state["world_size"])
        compared = {
            "fingerprint of the data": (state["fingerprint"], self.batches.shards.fingerprint),
            "number of samples": (state["n"], self.n),
            "seed": (state["seed"], self.seed),
            "global batch": (saved.global_batch, self.geometry.global_batch),
        }
        self.epoch, self.done, self._fresh = state["epoch"], 0, True
        for what, (before, now) in compared.items():
            if before != now:
                if self.resume == RESTART:
                    return
                raise ConfigError(
                    f"cannot continue: the {what} was {before} when the run was saved and is {now} now. Restore it,"
                    f" start a new run (name=OTHER), or accept a repeated epoch with data.resume={RESTART}."
                )
        samples = state["batches"] * saved.batch_size * saved.world_size
        self.done, rest = divmod(samples, self.geometry.batch_size * self.geometry.world_size)
        if rest:
            raise ConfigError(
                f"cannot continue: the run was saved inside a global batch ({state['batches']} micro-batches of"
                f" {saved.batch_size} x {saved.world_size}). Continue with the same batch_size and number of devices."
            )


class ValidationLoader:
    """Every validation sample once, in fixed order, spread over the ranks: the last batch is filled up and masked.

    Batches carry `valid` (B,) bool; all ranks have equally many batches, so that collective operations match.
    """

    def __init__(
        self,
        batches: Batches,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        samples: int | None = None,
        threads: int = 2,
        prefetch: int = 4,
    ) -> None:
        self.batches, self.threads, self.prefetch = batches, threads, prefetch
        self.geometry = Geometry(batch_size, 1, rank, world_size)
        n = len(batches.shards)
        count = min(n, n if samples is None else samples)
        # spread over the whole, because data sets often come sorted
        self.indices = np.arange(count) * n // max(count, 1)

    def __len__(self) -> int:
        size = self.geometry.global_batch
        return (len(self.indices) + size - 1) // size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        padded = np.zeros(len(self) * self.geometry.global_batch, np.int64)
        padded[: len(self.indices)] = self.indices

        def job(number: int) -> dict[str, Any]:
            rows = self.geometry.rows(number)
            positions = np.arange(rows.start, rows.stop)
            batch = self.batches(padded[rows], np.zeros_like(positions), positions.tolist())
            batch["valid"] = torch.from_numpy(positions < len(self.indices))
            return batch

        yield from in_order(job, range(len(self)), self.threads, self.prefetch)
