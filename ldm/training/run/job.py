"""One training run, decided: what it reads, starts from and is, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from ldm.build import build
from ldm.checkpoints.folder import find, read_manifest
from ldm.checkpoints.pretrained import check_pretrained
from ldm.config.check import module_kind
from ldm.config.root import digest
from ldm.data.datamodule import ShardDataModule
from ldm.errors import ConfigError
from ldm.launch import is_first, launch
from ldm.text.templates import Templates
from ldm.training.distributed import processes
from ldm.training.distributed.strategy import check_trainer, local_processes
from ldm.training.run.captions import caption_templates, captions_read, class_names, reads_captions, words_of
from ldm.training.run.class_images import ClassImages, read_class_images
from ldm.training.run.frozen import check_frozen_dtype
from ldm.training.run.identity import decisive


@dataclass(frozen=True)
class Job:
    """What `resolve` found out; nothing changes it afterwards."""

    config: dict[str, Any]  # complete: with the image size, vocabulary and classes that the data have
    data: ShardDataModule
    start: dict[str, Path]  # checkpoint folders: "latents", of the autoencoder that made them; "given", checkpoint=
    templates: Templates | None
    class_images: ClassImages | None
    tokenizer: CLIPTokenizer | None
    identity: dict[str, Any]

    @property
    def kind(self) -> str:
        return module_kind(self.config)


def resolve(given: dict[str, Any]) -> Job:
    """The run that a resolved configuration describes. ConfigError for what cannot be trained.

    All processes must come to the same one; `agree` compares.
    """
    check_trainer(given["trainer"])
    if launch().world_size == 1 and local_processes(given["trainer"])[0] > 1:  # by a script of one's own
        raise ConfigError(
            f"trainer.devices={given['trainer']['devices']} and one process: python -m ldm.run starts the others, "
            "or torchrun."
        )
    check_frozen_dtype(given)
    if not given["checkpoint"]:
        has_latents = bool(given["shards"]) and (Path(given["shards"]) / "autoencoder").is_dir()
        check_pretrained(given, not has_latents, module_kind(given) == "latent_diffusion")
    data = _open_data(given)
    config = _with_data(given, data)
    start = _starting_checkpoints(config, data)
    templates, class_images, tokenizer = None, None, None
    if module_kind(config) == "latent_diffusion":
        templates = caption_templates(config)
        class_images = read_class_images(config, start.get("latents", start.get("given")))
        node = config["text_encoder"]
        tokenizer, node = words_of(node, captions_read(data, templates), start.get("given"))
        if "classes" in node:
            node = {**node, "classes": class_names(data, templates, node["classes"])}
        config["text_encoder"] = node
    identity = _identity(config, data, start)
    if templates is not None:
        identity["templates"] = templates.identity
    if class_images is not None:
        identity["prior"] = {**class_images.identity, "weight": config["prior_weight"]}
    return Job(config, data, start, templates, class_images, tokenizer, identity)


def agree(job: Job) -> None:
    """Before anything is built: all processes see the same data, words and starting weights."""
    facts = {
        "data.fingerprint": job.data.fingerprint,
        "validation data": job.data.split("val").fingerprint if job.data.mode == "index" else None,
        "image_size": job.config["image_size"],
        "vocabulary": digest(sorted(job.tokenizer.get_vocab().items())) if job.tokenizer is not None else None,
        **job.identity,
    }
    processes.agree(facts, f"all hosts must read the same files (shards={job.config['shards']}).")


def remark_on_few(job: Job) -> None:
    """Says what so few pictures mean, on the first process."""
    data, templates = job.data, job.templates
    if data.mode != "index" or not is_first():
        return
    n, pictures = data.n_train, f"{data.n_train} picture{'s' if data.n_train > 1 else ''}"
    if data.validates_on_training:
        print(
            f"{pictures}: all are trained on, and validation looks at the same ones (more pictures, or a larger "
            "source.validation_fraction=, with shards= data.validation_fraction=, hold some out).",
            flush=True,
        )
    if templates is not None and n < templates.usual[0]:
        few, many = templates.usual
        print(
            f"warning: {pictures} of a {templates.learns}; {few} to {many} are usual, and fewer tend to be learnt by "
            "heart: add some that differ in all but what is to be learnt.",
            flush=True,
        )


def _open_data(config: dict[str, Any]) -> ShardDataModule:
    data: ShardDataModule = build(config["data"], "data")
    data.captions_read = reads_captions(config)
    data.setup()
    if data.captions_read:
        data.require_captions()
    return data


def _with_data(given: dict[str, Any], data: ShardDataModule) -> dict[str, Any]:
    """The configuration with what the data say: the image size that prepare found out, where none was given."""
    config = {**given, "image_size": data.image_size, "data": {**given["data"], "image_size": data.image_size}}
    if Path(config["shards"]).exists():  # a run is found again from any working directory
        config["shards"] = config["data"]["shards"] = str(Path(config["shards"]).resolve())
    if config.get("class_shards"):
        config["class_shards"] = str(Path(config["class_shards"]).resolve())
    if module_kind(config) == "autoencoder" and data.kind == "latent":
        raise ConfigError(
            f"shards={config['shards']} holds latents, an autoencoder trains on images: give those shards."
        )
    return config


def _starting_checkpoints(config: dict[str, Any], data: ShardDataModule) -> dict[str, Path]:
    """Checkpoint folders to start from: the one given, and the autoencoder that made the latents."""
    start, diffusion = {}, module_kind(config) == "latent_diffusion"
    if diffusion and data.kind == "latent":
        start["latents"] = find(Path(config["shards"]) / "autoencoder")
    if config["checkpoint"]:
        start["given"] = find(config["checkpoint"])
    if diffusion and not start and not config["autoencoder"].get("pretrained"):
        raise ConfigError(
            "latent diffusion needs a trained autoencoder: give checkpoint=RUN (of module=autoencoder), shards= of "
            "latents that task=encode wrote, or autoencoder.pretrained= (hub id or folder)."
        )
    return start


def _identity(config: dict[str, Any], data: ShardDataModule, start: dict[str, Path]) -> dict[str, Any]:
    found = decisive(config, launch().world_size)
    return {
        **found,
        "data": {**found["data"], "fingerprint": data.fingerprint},
        "start": {k: digest(read_manifest(v)["files"]) for k, v in start.items()},
        "start_weights": config["weights"] if "given" in start else None,
    }
