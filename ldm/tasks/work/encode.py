"""Shards of images into shards of latents."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from ldm.autoencoders.kl import Autoencoder
from ldm.checkpoints.components import task_device
from ldm.checkpoints.folder import read_manifest, take_parts
from ldm.checkpoints.load import load_any
from ldm.checkpoints.stages import to_native
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.data.fields import fields_of
from ldm.data.samples import sequential
from ldm.data.shards.splits import LATENT_FIELD, MIRRORED_FIELD, Shards, file_name, open_split, split_names
from ldm.data.shards.writer import Written, write_dataset
from ldm.data.sources.item import Item, Reject
from ldm.errors import ConfigError
from ldm.pictures import to_unit


def encode(config: DictConfig) -> dict[str, float]:
    """Writes output=DIR from shards=PATH with the autoencoder of checkpoint=RUN."""
    check(config)
    values = plain(config)
    if values["checkpoint"]:
        values["checkpoint"] = str(to_native(values))
    written = encode_shards(values, Path(config.output) if config.output else None)
    print(written)
    print(f"latents: {written.output}")
    return {f"samples/{split}": float(n) for split, n in written.samples.items()}


def encode_shards(config: dict[str, Any], output: Path | None = None) -> Written:
    """Latents (their moments, float16) with their captions, and the autoencoder's checkpoint beside them.

    A caption becomes .txt, whatever it was read from; a picture without one is a latent without one.
    With data.flip=true the mirrored pictures' latents too: a mirrored latent is not the mirrored picture's.
    """
    if not config["checkpoint"] or not config["shards"]:
        raise ConfigError("task=encode needs shards=PATH (of images) and checkpoint=RUN (a trained autoencoder).")
    parts = load_any(config["checkpoint"], config["weights"])
    trained, folder = parts.config, parts.folder
    assert folder is not None
    autoencoder = parts.for_sampling().to(task_device()).autoencoder
    autoencoder.latents.require_measured()
    fraction, flip = config["data"]["validation_fraction"], config["data"]["flip"]
    fields = fields_of(config["data"])
    names = split_names(config["shards"], fraction, fields)
    data = {name: open_split(config["shards"], name, fraction, fields) for name in names}
    size = config["image_size"] or data["train"].facts.get("image_size") or trained.get("image_size")
    if not size:
        raise ConfigError(f"neither {config['shards']} nor {folder} says how large pictures are: type image_size=256.")
    identity = {
        "images": {name: shards.fingerprint for name, shards in data.items()},
        "autoencoder": read_manifest(folder)["files"]["vae.safetensors"]["sha256"],
        "weights": config["weights"],
        "image_size": size,
        "version": 1,
        **({"flip": True} if flip else {}),
    }
    output = output or Path(config["outputs"]) / "stages" / f"latents-{digest(identity)}"
    facts = {**data["train"].facts, "image_size": size, "parent": str(Path(config["shards"]).resolve())}
    facts["autoencoder"] = identity["autoencoder"]
    encoded = (size, config["batch_size"], flip)
    items = (i for name, shards in data.items() for i in _items(shards, name, autoencoder, *encoded))
    written = write_dataset(items, output, facts=facts, identity=identity)
    # The autoencoder that made the latents travels with them: decoding needs it, and no other fits.
    take_parts(folder, ["vae"], written.output / "autoencoder")
    return written


@torch.no_grad()
def _items(
    shards: Shards, split: str, autoencoder: Autoencoder, size: int, batch_size: int, flip: bool
) -> Iterator[Item | Reject]:
    def moments(images: torch.Tensor) -> np.ndarray:
        on_device = images.to(autoencoder.latents.mean.device)
        return autoencoder.encode(on_device).moments().half().cpu().numpy()

    for batch, bad in sequential(shards, size, batch_size, fields=shards.reading.optional()):
        yield from (Reject(b.key, b.error.reason, str(b.error)) for b in bad)
        if batch:
            images = to_unit(batch["image"])
            latents = {LATENT_FIELD: moments(images), **({MIRRORED_FIELD: moments(images.flip(-1))} if flip else {})}
            for i, (key, caption) in enumerate(zip(batch["key"], batch["caption"], strict=True)):
                yield _item(key, caption, {name: rows[i] for name, rows in latents.items()}, split)


def _item(key: str, caption: str | None, latents: dict[str, np.ndarray], split: str) -> Item | Reject:
    if not all(np.isfinite(latent).all() for latent in latents.values()):
        return Reject(key, "latent outside float16")
    text = {} if caption is None else {"txt": caption.encode()}
    return Item({**{k: _npy(v) for k, v in latents.items()}, **text}, split, key=file_name(key))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
