"""What a run keeps on disk: pictures, latents, checkpoints, averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.fields import fields_of
from ldm.data.shards.splits import open_split
from ldm.memory.plan import Plan, gpus_of
from ldm.memory.simulated import Simulated

BLOCK = 512  # of a tar: a header, and what a member is filled up to
NPY = 128  # bytes before an array's numbers
CAPTION = 100  # bytes, assumed
# img2dataset's README: LAION-400M at 256 pixels is 10 TB of 413 million JPEGs with captions and metadata.
JPEG = 10e12 / 413e6 / 256**2  # bytes a pixel


@dataclass(frozen=True)
class Data:
    """image, latent: bytes of one in its shard, caption included. images: how many, None where nobody says.
    measured: whether pictures were looked at, or are assumed. cached: whether training reads latents."""

    image: float
    latent: int
    images: float | None
    measured: bool
    cached: bool

    @property
    def read(self) -> float:
        """Bytes of what training reads for one picture."""
        return self.latent if self.cached else self.image


def data_of(config: Mapping[str, Any]) -> Data:
    """Of the shards that are named; of pictures that are assumed where none are."""
    step = Simulated(config)
    shape = step.module.autoencoder.encode(step.images()[:1]).moments().shape[1:]
    copies = 2 if config["data"].get("flip") else 1
    latent = member(CAPTION) + copies * member(NPY + 2 * shape.numel())
    cached = step.diffusion is not None and not step.encodes
    image, count, measured = JPEG * config["image_size"] ** 2, config.get("dataset_images"), False
    if config["shards"]:
        data = open_split(config["shards"], "train", config["data"]["validation_fraction"], fields_of(config["data"]))
        size = sum(Path(file).stat().st_size for file in data.files) / len(data)
        if data.kind == "latent":
            latent, cached = round(size), True
        else:
            image = size
        count, measured = count or len(data), True
    return Data(image, latent, count, measured, cached)


def member(size: int) -> int:
    """Bytes of a file of `size` bytes in a tar."""
    return BLOCK + -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Checkpoints:
    """Bytes: of one checkpoint but for frozen parts, which all share; of those; of all that stay; of snapshots of
    averages (ema=power). kept: how many stay, with the one that is written before another goes."""

    one: int
    frozen: int
    kept: int
    snapshots: int

    @property
    def total(self) -> int:
        return self.kept * self.one + self.frozen + self.snapshots


def checkpoints_of(config: Mapping[str, Any], memory: Plan) -> Checkpoints:
    """All but the optimizer's state is in float32, whatever it is in memory."""
    trained = 4 * sum(p.trained for p in memory.parts)
    frozen = 4 * sum(p.parameters for p in memory.parts) - trained
    one = trained + memory.shares * (memory.optimizer + memory.average)
    node, steps = (config["callbacks"] or {}).get("checkpoints") or {}, config["max_steps"]
    made = -(-steps // node["every_n_steps"]) if node else 0
    stay = node.get("keep_last", 2)
    kept = min(made, made if stay is None else stay + 1) + bool(node.get("keep_best"))
    if images := node.get("keep_every_n_images"):
        kept = min(made, kept + steps * config["batch_size"] * config["accumulate"] * gpus_of(config) // images)
    lengths, taken = (config["ema"] or {}).get("lengths"), (config["callbacks"] or {}).get("snapshots")
    each = 2 if taken and taken.get("dtype") == "float16" else 4
    snapshots = 0
    if lengths and taken:
        snapshots = -(-steps // taken["every_n_steps"]) * len(lengths) * trained * each // 4
    return Checkpoints(one, frozen, kept, snapshots)
