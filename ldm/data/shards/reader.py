"""Random access to samples in tars, as a source stage for webdataset's pipelines."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from ldm.data.shards.splits import Shards
from ldm.errors import ConfigError


class IndexedShards(IterableDataset):
    """The samples at these positions, in this order, as webdataset's own dicts: `__key__`, `__url__`, field -> bytes.

    One pread a sample instead of a walk through the tar: 3.6 to 5.4 times less CPU than webdataset's iteration, any
    permutation, and any position is reached at once. `fields` leaves the others unread; `marks` are further entries for
    each sample (the loader's `__index__`), which a later stage of the pipeline reads.
    """

    def __init__(
        self,
        shards: Shards,
        positions: Sequence[int] | np.ndarray | None = None,
        fields: Sequence[str] | None = None,
        marks: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.shards = shards
        self.positions = np.arange(len(shards)) if positions is None else np.asarray(positions, dtype=np.int64)
        self.columns = shards.index.columns(fields)
        self.marks = marks

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index, files = self.shards.index, self.shards.files
        names = [index.fields[c] for c in self.columns]
        # .tolist() once: picking numpy scalars one by one costs more than reading a small sample
        rows = zip(
            index.keys[self.positions].tolist(),
            index.shard[self.positions].tolist(),
            index.offset[self.positions][:, self.columns].tolist(),
            index.size[self.positions][:, self.columns].tolist(),
            strict=True,
        )
        for row, (key, shard, offsets, sizes) in enumerate(rows):
            sample: dict[str, Any] = {"__key__": key.decode("utf-8"), "__url__": str(files[shard])}
            self._read(sample, shard, names, offsets, sizes)
            if self.marks is not None:
                sample.update(self.marks[row])
            yield sample

    def _read(self, sample: dict[str, Any], shard: int, names: list[str], offsets: list[int], sizes: list[int]) -> None:
        present = [i for i, offset in enumerate(offsets) if offset >= 0]
        if not present:
            return
        file = self.shards.descriptors.get(self.shards.files[shard])
        start = min(offsets[i] for i in present)
        length = max(offsets[i] + sizes[i] for i in present) - start
        if length <= sum(sizes[i] for i in present) + 2048 * len(present):  # side by side: one read for all
            data = os.pread(file.fd, length, start)
            for i in present:
                at = offsets[i] - start
                sample[names[i]] = data[at : at + sizes[i]]
        else:
            for i in present:
                sample[names[i]] = os.pread(file.fd, sizes[i], offsets[i])
        for i in present:
            if len(sample[names[i]]) != sizes[i]:
                raise ConfigError(
                    f"{self.shards.files[shard]}: sample {sample['__key__']!r} ends early: the file changed since"
                    " it was opened. Start again when nothing writes to it."
                )
