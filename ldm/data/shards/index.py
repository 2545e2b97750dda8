"""Where every field of every sample lies: the byte index beside the tars. Pure numpy, rebuilt by a scan at any time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Index:
    """n samples x F fields: `offset` and `size` are -1 where a sample lacks a field."""

    fields: tuple[str, ...]
    keys: np.ndarray  # (n,) bytes
    shard: np.ndarray  # (n,) int32
    offset: np.ndarray  # (n, F) int64
    size: np.ndarray  # (n, F) int64

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, position: int) -> str:
        return self.keys[position].decode("utf-8")

    def columns(self, wanted: Sequence[str] | None = None) -> list[int]:
        """The columns of the wanted fields that exist here; all without `wanted`."""
        return [i for i, field in enumerate(self.fields) if wanted is None or field in wanted]

    def take(self, positions: np.ndarray) -> "Index":
        """The same index for some of the samples."""
        return Index(
            self.fields, self.keys[positions], self.shard[positions], self.offset[positions], self.size[positions]
        )

    def save(self, path: Path, **notes: str) -> None:
        """Write it as an .npz without pickles; notes are strings kept beside the arrays."""
        with open(path, "wb") as file:
            np.savez(
                file,
                fields=np.array(self.fields, dtype=np.str_),
                keys=self.keys,
                shard=self.shard,
                offset=self.offset,
                size=self.size,
                **{f"note_{name}": np.array(text) for name, text in notes.items()},  # type: ignore[arg-type]
            )


def load(path: Path) -> tuple[Index, dict[str, str]]:
    """Read what `Index.save` wrote; ValueError or OSError if it is not that."""
    with np.load(path, allow_pickle=False) as arrays:
        notes = {name.removeprefix("note_"): str(arrays[name]) for name in arrays.files if name.startswith("note_")}
        index = Index(
            tuple(str(f) for f in arrays["fields"]), arrays["keys"], arrays["shard"], arrays["offset"], arrays["size"]
        )
    shape = (len(index.keys), len(index.fields))
    if not (index.offset.shape == index.size.shape == shape and index.shard.shape == shape[:1]):
        raise ValueError("the arrays of the index do not fit one another")
    numbers = (index.shard.dtype, index.offset.dtype, index.size.dtype)
    if index.keys.dtype.kind != "S" or numbers != (np.int32, np.int64, np.int64):
        raise ValueError("the arrays of the index have other types than were written")
    return index, notes


def build(shards: Sequence[Sequence[tuple[str, dict[str, tuple[int, int]]]]]) -> Index:
    """An index of samples (key, {field: (offset, size)}), shard by shard."""
    fields = tuple(sorted({field for samples in shards for _, found in samples for field in found}))
    column = {field: i for i, field in enumerate(fields)}
    n = sum(map(len, shards))
    offset = np.full((n, len(fields)), -1, np.int64)
    size = np.full((n, len(fields)), -1, np.int64)
    keys, shard, row = [], np.zeros(n, np.int32), 0
    for number, samples in enumerate(shards):
        for key, found in samples:
            keys.append(key.encode("utf-8"))
            shard[row] = number
            for field, (where, length) in found.items():
                offset[row, column[field]], size[row, column[field]] = where, length
            row += 1
    return Index(fields, np.array(keys, dtype=np.bytes_), shard, offset, size)
