"""Small data sets and the loaders over them, for the tests of loading."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.datamodule import ShardDataModule
from ldm.data.shards.writer import write_dataset
from ldm.data.sources.item import Item, image_item


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def dataset(folder: Path, n: int, bad: dict[int, dict[str, bytes]] | None = None, size: int = 8) -> Path:
    """n pictures whose red says which they are; `bad` puts other fields in place of some."""

    def items():
        for i in range(n):
            picture = Image.new("RGB", (size, size), (i % 256, 0, 0))
            item = image_item(encoded(picture), "png", f"picture {i}")
            yield Item(bad[i]) if bad and i in bad else item

    write_dataset(items(), folder, samples_per_shard=16)
    return folder


def module(path: Path, batch_size: int = 4, **options) -> ShardDataModule:
    options = {"validation_fraction": 0.0, "threads": 2} | options
    return ShardDataModule(str(path), 8, batch_size, **options)


def loader(path: Path, rank: int = 0, world: int = 1, batch_size: int = 4, accumulate: int = 1, **options):
    data = module(path, batch_size, accumulate=accumulate, **options)
    data._place = lambda: (rank, world)  # what the trainer would say
    return data.train_dataloader()


def keys(batches) -> list[list[str]]:
    return [batch["key"] for batch in batches]
