"""The data as Lightning wants them."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch

from ldm.data.captions import SampleError
from ldm.data.fields import read_fields
from ldm.data.loader import REFUSE, ThreadLoader, ValidationLoader
from ldm.data.order import Geometry
from ldm.data.samples import Batches, Stage, stages_for
from ldm.data.shards.reader import IndexedShards
from ldm.data.shards.splits import Shards, open_split, split_names
from ldm.data.shards.stream import StreamLoader
from ldm.data.transforms import CropImage, DecodeImage
from ldm.errors import ConfigError

log = logging.getLogger(__name__)


class ShardDataModule(L.LightningDataModule):
    """Training and validation batches from one folder of shards, of images or of latents.

    Batches: "image" uint8 (B, 3, H, W) or "latent" float32 (B, MC, h, w), "caption", "key", "index"; validation adds
    "valid" (B,). The state of the training loader travels in Lightning's checkpoint with the loader.
    """

    def __init__(
        self,
        shards: str | None,
        image_size: int | None,  # None: what prepare found out
        batch_size: int,  # per rank and micro-batch
        accumulate: int = 1,
        seed: int = 0,
        threads: int = 2,  # 0: in the main thread
        prefetch: int = 4,  # batches ahead
        mode: str = "index",  # or stream: webdataset's sequential reader
        crop: str = "centre",  # or random
        flip: bool = False,
        shuffle: bool = True,
        validation_fraction: float = 0.02,  # of a folder without val/
        validation_samples: int | None = None,  # at most so many
        validation_batch_size: int | None = None,
        train_samples: int | None = None,  # the first so many only: to overfit on purpose
        max_bad: int | None = None,  # unusable samples before it stops; null: 10 or 1 in 1000
        resume: str = REFUSE,  # or restart_epoch, when the data have changed
        epoch_samples: int | None = None,  # stream only: what an epoch is
        fields: Mapping[str, Any] | None = None,  # image, caption: members in order of preference (ldm.data.fields)
        class_names: str | None = None,  # file with a name a line: captions of the numbers in .cls
    ) -> None:
        super().__init__()
        if mode not in ("index", "stream"):
            raise ConfigError(f"data.mode={mode}: there is index and stream.")
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate), ("image_size", image_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: at least 1.")
        self.shards, self.batch_size, self.accumulate = shards, batch_size, accumulate
        self._image_size = image_size
        self.seed, self.threads, self.prefetch, self.mode = seed, threads, prefetch, mode
        self.crop, self.flip, self.shuffle, self.max_bad, self.resume = crop, flip, shuffle, max_bad, resume
        self.validation_fraction, self.validation_samples = validation_fraction, validation_samples
        self.validation_batch_size, self.train_samples = validation_batch_size or batch_size, train_samples
        self.epoch_samples = epoch_samples
        self.fields = read_fields(fields, class_names)
        self.captions_read = True  # false, set before anything is read: every caption is the empty one
        self._splits: dict[str, Shards] = {}
        self._train: ThreadLoader | StreamLoader | None = None

    def split(self, name: str) -> Shards:
        """The samples of "train" or "val", opened once."""
        if not self.shards:
            raise ConfigError(
                "no shards given: type shards=PATH (a folder that task=prepare wrote, or any webdataset tars), or"
                " images=DIR for a folder of pictures."
            )
        if name not in self._splits:
            found = open_split(self.shards, name, self.validation_fraction, self.fields)
            if found.kind == "latent" and self.captions_read:
                found = self._captioned(found)
            if name == "train" and self.train_samples is not None and self.train_samples < len(found):
                found = found.take(np.arange(self.train_samples), f"first {self.train_samples}")
            self._splits[name] = found
        return self._splits[name]

    def _captioned(self, latents: Shards) -> Shards:
        """Without the latents of pictures that had no caption, where others had one: only their text was missing."""
        columns = latents.index.columns(latents.reading.caption_members)
        there = np.flatnonzero((latents.index.offset[:, columns] >= 0).any(axis=1))
        if len(there) in (0, len(latents)):
            return latents
        log.warning("%s: %d latents without a caption are left out", latents.path, len(latents) - len(there))
        return latents.take(there, "with captions")

    def setup(self, stage: str | None = None) -> None:
        """Open what will be read, so that a wrong path stops the run before anything is built."""
        if self.mode == "index":
            self.split("train")

    @property
    def image_size(self) -> int:
        """Pixels a side: as given, or what prepare found out."""
        size = self._image_size or (self.facts.get("image_size") if self.mode == "index" else None)
        if size is None:
            raise ConfigError(f"{self.shards} does not say its image size: type image_size=256, say.")
        return int(size)

    @property
    def fingerprint(self) -> str:
        """Of the content of the training split."""
        return self.split("train").fingerprint

    @property
    def n_train(self) -> int:
        return len(self.split("train"))

    @property
    def n_val(self) -> int:
        return len(self._validation() or ())

    @property
    def validates_on_training(self) -> bool:
        """Whether the samples are so few that none is held out: validation then looks at those trained on."""
        return self.mode == "index" and "val" not in split_names(
            self.shards or "", self.validation_fraction, self.fields
        )

    @property
    def kind(self) -> str:
        """ "image" or "latent"."""
        return self.split("train").kind

    @property
    def facts(self) -> dict[str, Any]:
        """What prepare or encode found out about the data set."""
        return self.split("train").facts

    def captions(self, split: str = "train") -> Iterator[str]:
        """All captions of a split, in the order of the shards; samples without a usable one are left out."""
        shards = self.split(split)
        for sample in IndexedShards(shards, fields=shards.reading.caption_members):
            try:
                yield shards.reading.caption_of(sample) or ""
            except SampleError:
                continue

    def require_captions(self) -> None:
        """ConfigError with the ways out where none of the first samples has a caption; a stream is not looked at."""
        if self.mode != "index":
            return
        shards = self.split("train")
        text: SampleError | None = None
        for sample in IndexedShards(shards, range(min(len(shards), 100))):
            try:
                shards.reading.caption_of(sample)
                return
            except SampleError as error:
                text = text or error
        if text is not None:
            again = "" if shards.kind == "image" else "encode the images again with "
            raise ConfigError(
                f"{self.shards}: {text}. Say where it stands: {again}data.fields.caption=[MEMBER], or [json:KEY];"
                " or train without: text_encoder=none and a model that reads no text, or one for all pictures,"
                ' instance_prompt="a photo".'
            )

    def train_dataloader(self) -> ThreadLoader | StreamLoader:
        """The one training loader: asked for again it is the same, so that its position is never lost."""
        geometry = self.geometry
        if self._train is None or self._train.geometry != geometry:
            self._train = self._stream(geometry) if self.mode == "stream" else self._indexed(geometry)
        return self._train

    @property
    def geometry(self) -> Geometry:
        """How a global batch is cut."""
        return Geometry(self.batch_size, self.accumulate, *self._place())

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        shards = self._validation()
        if shards is None or len(shards) == 0 or self.validation_samples == 0:
            return []
        rank, world = self._place()
        batches = self._batches(shards, "centre", flip=False)
        return ValidationLoader(
            batches, self.validation_batch_size, rank, world, self.validation_samples, self.threads, self.prefetch
        )

    def first_validation(self, n: int) -> dict[str, Any]:
        """The first n validation samples as one batch, the same in every process: what pictures are drawn of."""
        shards = self.split("val")
        return self._first(shards, min(n, len(shards)))

    def some_training_images(self, n: int, batch_size: int = 256) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W) of the first n training samples, in the order of the shards."""
        shards = self.split("train")
        for first in range(0, min(n, len(shards)), batch_size):
            count = min(batch_size, n - first, len(shards) - first)
            yield self._first(shards, count, first)["image"]

    def _first(self, shards: Shards, count: int, first: int = 0) -> dict[str, Any]:
        indices = np.arange(first, first + count)
        return self._batches(shards, "centre", flip=False)(indices, np.zeros_like(indices), indices.tolist())

    def _indexed(self, geometry: Geometry) -> ThreadLoader:
        batches = self._batches(self.split("train"), self.crop, self.flip)
        return ThreadLoader(
            batches, geometry, self.seed, self.threads, self.prefetch, shuffle=self.shuffle, resume=self.resume
        )

    def _batches(self, shards: Shards, crop: str, flip: bool) -> Batches:
        reading = shards.reading if self.captions_read else shards.reading.unread()
        stages, members = stages_for(shards, self.image_size, crop, flip, self.seed, reading)
        return Batches(shards, stages, members, self.seed, self.max_bad, self._on_gpu())

    def _stream(self, geometry: Geometry) -> StreamLoader:
        if not self.shards or not self.epoch_samples:
            raise ConfigError(
                "data.mode=stream needs shards=PATH_OR_PATTERN and data.epoch_samples=N: a stream has no length."
            )
        stages: list[Stage] = [
            DecodeImage(self.image_size, self.fields if self.captions_read else self.fields.unread()),
            CropImage(self.image_size, self.crop, self.flip, self.seed),
        ]
        size = self.epoch_samples
        return StreamLoader(self.shards, stages, geometry, size, self.seed, max_bad=self.max_bad, threads=self.threads)

    def _validation(self) -> Shards | None:
        """A stream knows no held-out share: it has none."""
        return self.split("val") if self.mode == "index" else None

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
