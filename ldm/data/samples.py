"""From positions to a batch: webdataset's pipeline over our source, and what happens to samples that cannot be used."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import webdataset as wds

from ldm.data.captions import SampleError
from ldm.data.fields import Fields
from ldm.data.order import uniforms
from ldm.data.shards.reader import IndexedShards
from ldm.data.shards.splits import LATENT_FIELD, MIRRORED_FIELD, Shards
from ldm.data.threads import in_order
from ldm.data.transforms import CropImage, DecodeImage, DecodeLatent, read_npy
from ldm.errors import ConfigError

log = logging.getLogger(__name__)
Stage = Callable[[Any], Any]
_TRIES = 64


@dataclass(frozen=True)
class Bad:
    """What stands in the pipeline in place of a sample that a stage could not use."""

    key: str
    url: str
    error: SampleError


def careful(stage: Stage) -> Stage:
    """A stage that turns SampleError into a `Bad`, so that webdataset neither stops nor drops the row."""

    def run(sample: Any) -> Any:
        if isinstance(sample, Bad):
            return sample
        try:
            return stage(sample)
        except SampleError as error:
            return Bad(sample["__key__"], sample["__url__"], error)

    return run


def stages_for(
    shards: Shards, image_size: int, crop: str, flip: bool, seed: int, fields: Fields | None = None
) -> tuple[list[Stage], list[str]]:
    """The map stages for this data set and the members that they read; `fields` may read less than the data set's."""
    fields = fields or shards.reading
    if shards.kind == "image":
        decode = DecodeImage(image_size, fields)
        return [decode, CropImage(image_size, crop, flip, seed)], list(decode.members)
    if crop != "centre":
        raise ConfigError("data.crop=random cannot be had from encoded latents: use data.crop=centre, or the images.")
    if flip and MIRRORED_FIELD not in shards.fields:
        raise ConfigError(
            "data.flip=true needs the mirrored pictures' latents too, and these shards have none: encode the images "
            "with task=encode data.flip=true, or leave data.flip=false."
        )
    latents = DecodeLatent(latent_shape(shards), fields, flip, seed)
    return [latents], list(latents.members)


def latent_shape(shards: Shards) -> tuple[int, ...] | None:
    """The shape of the first readable latent: all of a data set must have it to stand in one batch."""
    for sample in IndexedShards(shards, range(min(len(shards), 10)), [LATENT_FIELD]):
        with suppress(SampleError, KeyError):
            return read_npy(sample[LATENT_FIELD]).shape
    return None


class Errors:
    """Counts bad samples and stops when they are too many to be accidents.

    Counted are different samples, so that one bad file of a small data set does not end a long run in its tenth epoch.
    """

    def __init__(self, n: int, max_bad: int | None = None) -> None:
        self.n, self.max_bad = n, max_bad
        self.seen, self.counts = 0, Counter[str]()
        self._known, self._warned, self._lock = set[str](), set[str](), threading.Lock()

    @property
    def bad(self) -> int:
        return len(self._known)

    def saw(self, samples: int) -> None:
        with self._lock:
            self.seen += samples

    def add(self, bad: Bad) -> None:
        """Count it, warn once a shard, and raise ConfigError beyond `max_bad` (default: 10 or 1 in 1000 samples)."""
        with self._lock:
            name = f"{bad.url} {bad.key}"
            if name in self._known:
                return
            self._known.add(name)
            self.counts[bad.error.reason] += 1
            if bad.url not in self._warned:
                self._warned.add(bad.url)
                log.warning("%s: sample %r replaced by another: %s", bad.url, bad.key, bad.error)
            limit = max(10, min(self.seen, self.n) // 1000) if self.max_bad is None else self.max_bad
            if self.bad > limit:
                reasons = ", ".join(f"{reason}: {count}" for reason, count in self.counts.most_common())
                raise ConfigError(
                    f"{self.bad} bad samples of {min(self.seen, self.n)} seen, {limit} allowed ({reasons}). The last:"
                    f" {bad.url}, {bad.key!r}: {bad.error}. Repair the data (task=check lists all), or data.max_bad=N."
                )


class Batches:
    """Makes the batch of given rows: reads, decodes, replaces what is bad, stacks. Threads call it at once."""

    def __init__(
        self,
        shards: Shards,
        stages: Sequence[Stage],
        fields: Sequence[str],
        seed: int = 0,
        max_bad: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.shards, self.stages, self.fields, self.seed = shards, [careful(s) for s in stages], fields, seed
        self.errors, self.pin_memory = Errors(len(shards), max_bad), pin_memory

    def samples(self, indices: Sequence[int] | np.ndarray, epochs: Sequence[int] | np.ndarray) -> Iterator[Any]:
        """The pipeline of one job: our source, webdataset's map stages."""
        marks = [{"__index__": int(i), "__epoch__": int(e)} for i, e in zip(indices, epochs, strict=True)]
        source = IndexedShards(self.shards, indices, self.fields, marks)
        return iter(wds.DataPipeline(source, *(wds.map(stage) for stage in self.stages)))

    def __call__(self, indices: np.ndarray, epochs: np.ndarray, positions: Sequence[int]) -> dict[str, Any]:
        """One batch; `positions` are places in the epoch, which alone decide what replaces a bad sample there."""
        self.errors.saw(len(indices))
        rows = list(self.samples(indices, epochs))
        for i, row in enumerate(rows):
            if isinstance(row, Bad):
                rows[i] = self.replacement(row, int(epochs[i]), int(positions[i]))
        batch = collate(rows)
        if self.pin_memory:
            batch = {name: v.pin_memory() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        return batch

    def replacement(self, bad: Bad, epoch: int, position: int) -> dict[str, Any]:
        """The first good one of the samples that (seed, epoch, position) draws: never skip, never shrink a batch."""
        for attempt in range(_TRIES):
            self.errors.add(bad)
            index = int(uniforms(self.seed, "replace", epoch, position, attempt)[0] * len(self.shards))
            found = next(self.samples([index], [epoch]))
            if not isinstance(found, Bad):
                return found
            bad = found
        raise ConfigError(f"{_TRIES} samples in a row are bad, the last {bad.url}, {bad.key!r}: {bad.error}")


def sequential(
    shards: Shards,
    image_size: int,
    batch_size: int,
    threads: int = 2,
    positions: Sequence[int] | None = None,
    fields: Fields | None = None,
) -> Iterator[tuple[dict[str, Any], list[Bad]]]:
    """Every sample once and in order, centre crop: (batch, what could not be used), for encoding and checking.

    Nothing is replaced here, so a batch may be shorter than `batch_size`, and {} if none of its samples is good.
    `fields`: the data set's own, or less of them: `shards.reading.unread()` where nobody asks for captions.
    """
    stages, members = stages_for(shards, image_size, "centre", False, 0, fields)
    batches, chosen = Batches(shards, stages, members), positions if positions is not None else range(len(shards))

    def job(start: int) -> tuple[dict[str, Any], list[Bad]]:
        rows = list(batches.samples(chosen[start : start + batch_size], [0] * len(chosen[start : start + batch_size])))
        good = [row for row in rows if not isinstance(row, Bad)]
        return (collate(good) if good else {}), [row for row in rows if isinstance(row, Bad)]

    yield from in_order(job, range(0, len(chosen), batch_size), threads, 2 * threads)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> {"image" uint8 (B, 3, H, W) or "latent" float32 (B, MC, h, w), "caption", "key", "index"}.

    A caption is None where a sample may do without one and does.
    """
    batch: dict[str, Any] = {}
    if "image" in rows[0]:
        batch["image"] = torch.stack([row["image"] for row in rows])
    else:
        batch["latent"] = torch.from_numpy(np.stack([row["latent"] for row in rows]).astype(np.float32, copy=False))
    batch["caption"] = [row["caption"] for row in rows]
    batch["key"] = [row["__key__"] for row in rows]
    batch["index"] = [row["__index__"] for row in rows]  # numbers for the host: no device gives them back
    return batch
