"""The pictures that are measured: drawn by a model, and real ones out of its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders.kl import Autoencoder
from ldm.data.captions import SampleError
from ldm.data.fields import Fields
from ldm.data.samples import sequential
from ldm.data.shards.reader import IndexedShards
from ldm.data.shards.splits import Shards, open_split, split_names
from ldm.data.sources.shapes import draw_captions, pairs_seen, pairs_unseen
from ldm.errors import ConfigError
from ldm.features.cache import FeatureCache
from ldm.metrics.evaluation import Drawn, Evaluation, Group, as_bytes
from ldm.pictures import to_unit
from ldm.pipeline import Pipeline

BATCH = 64
FRACTION = 0.02  # of data.validation_fraction, where nothing says another
UNSEEN_NOISE = 10_000_000  # evaluation seeds start here: no training picture or callback uses them
MORE_NOISE = 2**40  # and those of pictures that a metric has drawn for itself here
SETTINGS = ("num_steps", "guidance", "guidance_rescale", "sampler", "eta", "guider")


def image_shards(path: str | None, fields: Fields, fraction: float = FRACTION) -> dict[str, Shards]:
    """Splits of the images behind a path: of the parent, where the path holds latents.

    fraction: the share that the training held out, where the data have no val/ of their own.
    """
    if not path or not Path(path).exists():
        raise ConfigError(f"the data are not at {path} any more: give shards=PATH of the images to compare with.")
    first = open_split(path, "train", fraction, fields)
    parent = Path(path) if first.kind == "image" else Path(first.facts.get("parent", ""))
    if not parent.is_dir():
        raise ConfigError(f"{path} holds latents, and their images are not at {parent} any more: give shards=PATH.")
    return {
        name: open_split(parent, name, fraction, fields)
        for name in dict.fromkeys([*split_names(parent, fraction, fields), "val"])
    }


def pictures_of(shards: Shards, size: int, limit: int | None = None, group: Group | None = None) -> Iterator[Tensor]:
    """Images in [-1, 1], in the order of the shards; those that cannot be read are left out. group: one's share."""
    return (pictures for pictures, _ in _read(shards, size, limit, shards.reading.unread(), group))


def _read(
    shards: Shards, size: int, limit: int | None, fields: Fields, group: Group | None = None
) -> Iterator[tuple[Tensor, list[str]]]:
    chosen = range(min(len(shards), limit or len(shards)))
    chosen = chosen if group is None else group.share(chosen)
    for batch, _ in sequential(shards, size, 256, positions=chosen, fields=fields):
        if batch:
            yield to_unit(batch["image"]), [caption or "" for caption in batch["caption"]]


def captions_of(images: Mapping[str, Shards], n: int, seed: int) -> dict[str, list[str]]:
    """What is drawn, n of each half: for the shapes captions of pairs trained on and of pairs never seen, else the
    validation captions in their order, again from the first where they are fewer."""
    facts = images["train"].facts
    if facts.get("source") == "shapes":
        fraction = facts["held_out_fraction"]
        halves = {"seen": pairs_seen(fraction), "unseen": pairs_unseen(fraction)}
        return {half: draw_captions(pairs, n, seed) for half, pairs in halves.items() if pairs}
    texts, reading = [], images["val"].reading.optional()
    for sample in IndexedShards(images["val"], range(min(n, len(images["val"]))), reading.caption_members):
        with suppress(SampleError):
            texts.append(reading.caption_of(sample) or "")
    return {"val": list(islice(cycle(texts), n))} if texts else {}


def evaluation_of(
    autoencoder: Autoencoder,
    pipe: Pipeline | None,
    images: Mapping[str, Shards],
    size: int,
    asked: Mapping[str, Any],
    cache: Path | None,
    group: Group | None = None,
) -> Evaluation:
    """Draws asked["eval_images"] pictures of each half by the settings in `asked`, and puts the real ones beside them.

    pipe: None for an autoencoder alone. size: pixels a side. cache: the folder of features that are known already.
    group: of processes that each draw their share.
    """
    group = group or Group()
    device = autoencoder.latents.mean.device
    drawn: dict[str, Drawn] = {}
    draw = None if pipe is None else _Draw(pipe, size, asked)
    for half, captions in captions_of(images, asked["eval_images"], asked["seed"]).items() if draw else ():
        assert draw is not None
        mine = group.share(range(len(captions)))
        first = UNSEEN_NOISE + asked["seed"] * 1_000_003
        told = [captions[i] for i in mine]
        drawn[half] = Drawn(draw.from_noise(told, [first + i for i in mine]), told, captions)

    @torch.no_grad()
    def reconstruct(pictures: Tensor) -> Tensor:
        latent = autoencoder.encode(pictures.to(device)).mode()
        return autoencoder.decode(latent).float().clamp(-1, 1).cpu()

    def captioned(split: str, limit: int | None) -> Iterator[tuple[Tensor, list[str]]]:
        return _read(images[split], size, limit, images[split].reading.optional())

    return Evaluation(
        list(images),
        lambda split, limit=None: pictures_of(images[split], size, limit),
        reconstruct,
        drawn,
        asked["eval_images"],
        images["train"].facts,
        captioned,
        draw,
        device,
        FeatureCache(cache),
        lambda split, limit=None: pictures_of(images[split], size, limit, group),
        group,
    )


@dataclass(frozen=True)
class _Draw:
    """Pictures of captions by one set of settings."""

    pipe: Pipeline
    size: int
    asked: Mapping[str, Any]

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.from_noise(captions, [MORE_NOISE + self.asked["seed"] * 1_000_003 + s for s in seeds])

    @torch.no_grad()
    def from_noise(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:  # -> uint8 (N,3,H,W)
        settings: dict[str, Any] = {k: self.asked.get(k) for k in SETTINGS}
        drawn = []
        for first in range(0, len(captions), BATCH):
            request = self.pipe.request(
                list(captions[first : first + BATCH]),
                height=self.size,
                width=self.size,
                seed=list(seeds[first : first + BATCH]),
                spacing=self.asked.get("grid"),
                **settings,
            )
            drawn.append(as_bytes(self.pipe.sampler.sample(request)))
        return torch.cat(drawn) if drawn else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
