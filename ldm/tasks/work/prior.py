"""The stage prior: pictures of the class, drawn once by the base model, and their latents (Ruiz et al. 2023)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.checkpoints.components import task_device
from ldm.checkpoints.folder import find, read_manifest
from ldm.config.root import digest
from ldm.data.shards.writer import Written
from ldm.data.sources.tree import pictures_in
from ldm.errors import ConfigError
from ldm.pipeline import Pipeline
from ldm.tasks.work.encode import encode_shards
from ldm.tasks.work.prepare import prepare_shards


def check_prior(config: DictConfig) -> None:
    """ConfigError for what prior preservation lacks, before anything is drawn."""
    has_stage = config.stages.get("prior", False) is not False
    if (config.class_prompt or config.class_images) and "prior" not in config.stages and not config.class_shards:
        raise ConfigError(
            "class_prompt= and class_images= are read by experiment=dreambooth (or give class_shards=LATENTS too): "
            "choose it, or leave them out."
        )
    if not has_stage and not config.class_shards:
        return
    if not config.class_prompt:
        raise ConfigError(
            'what is the subject one of? Give class_prompt="a photo of a dog" (beside instance_prompt="a photo of sks '
            'dog"); without class pictures it is experiment=finetune.'
        )
    if config.masking:
        raise ConfigError(
            "masking=random needs the pictures at every step, and class pictures are kept as latents: choose "
            "experiment=dreambooth or experiment=inpaint, not both."
        )
    if not config.class_shards and not config.checkpoint:
        raise ConfigError("class pictures are drawn by the model that is started from: give checkpoint=PATH.")


def class_latents(config: Mapping[str, Any]) -> Written:
    """Latents of the class pictures in outputs/stages; what is there already is not made again."""
    if not config["image_size"]:
        raise ConfigError("the checkpoint does not say how large its pictures are: give image_size=512, say.")
    folder = draw_class_pictures(config)
    source = {"_target_": "ldm.data.sources.folder.FolderSource", "images": str(folder), "validation_fraction": 0.0}
    source |= {"min_side": 1, "uncaptioned": True}
    prepared = prepare_shards({"source": source, "outputs": config["outputs"]})
    if prepared.rejected:
        print(prepared, flush=True)
    reading = {**config["data"], "validation_fraction": 0.0, "flip": False}
    return encode_shards({**config, "shards": str(prepared.output), "data": reading})


def draw_class_pictures(config: Mapping[str, Any]) -> Path:
    """The folder of class pictures, with at least num_class_images in it: the base model draws those that are missing.

    Picture i has seed i and the checkpoint's own sampler. Each is written beside and renamed, so that an interruption
    loses nothing; none that is there is touched.
    """
    wanted, prompt = config["num_class_images"], config["class_prompt"]
    folder = Path(config["class_images"] or _own_folder(config))
    there = pictures_in(folder) if folder.is_dir() else []
    missing = [i for i in range(wanted) if not (folder / _name(i)).exists()][: max(0, wanted - len(there))]
    if not missing:
        more = f"; num_class_images={wanted} of them are used" if len(there) > wanted else ""
        print(f"class pictures: {len(there)} in {folder}{more}", flush=True)
        return folder
    print(f"class pictures: {len(there)} in {folder}; drawing {len(missing)} of '{prompt}'", flush=True)
    pipe = Pipeline.load(config["checkpoint"], weights=config["weights"])
    pipe.to(task_device())
    asked = {k: config[k] for k in ("num_steps", "guidance", "guidance_rescale")}
    asked |= {"height": config["image_size"], "width": config["image_size"]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(missing), config["batch_size"]):
            seeds = missing[first : first + config["batch_size"]]
            for i, picture in zip(seeds, pipe([prompt] * len(seeds), seed=seeds, **asked), strict=True):
                part = folder / f".{_name(i)}.part"
                picture.save(part, "PNG")
                os.replace(part, folder / _name(i))
    except OSError as error:
        raise ConfigError(f"class_images={folder}: cannot be written ({error.strerror or error}).") from error
    return folder


def _own_folder(config: Mapping[str, Any]) -> Path:
    """Named by all that decides the pictures."""
    base = digest(read_manifest(find(config["checkpoint"]))["files"])
    asked = {k: config[k] for k in ("class_prompt", "image_size", "num_steps", "guidance", "guidance_rescale")}
    return Path(config["outputs"]) / "stages" / f"class-{digest({'base': base, 'weights': config['weights'], **asked})}"


def _name(i: int) -> str:
    return f"class-{i:05d}.png"
