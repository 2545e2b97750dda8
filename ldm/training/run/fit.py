"""One training run: from a checked configuration and opened data to a finished run directory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint
from transformers import CLIPTokenizer

from ldm.build import build
from ldm.checkpoints.components import Components, attach_adapters, build_components, check_adapters, load_states
from ldm.checkpoints.folder import State, find, load_parts, newest, read_config, read_manifest
from ldm.checkpoints.pretrained import check_pretrained, load_pretrained
from ldm.config.root import digest
from ldm.data.datamodule import ShardDataModule
from ldm.errors import ConfigError
from ldm.text.encoder import CLIPTokenized
from ldm.text.templates import Templates
from ldm.text.tokenizer import build_tokenizer, load_tokenizer
from ldm.training.callbacks.saving import Checkpoints, ended_early
from ldm.training.distributed import processes
from ldm.training.distributed.meeting import launch
from ldm.training.distributed.strategy import check_trainer, launched, opened
from ldm.training.frozen import DTYPES, cast_frozen, check_frozen_dtype, keep_originals
from ldm.training.module import TrainedModule
from ldm.training.prior import read_prior
from ldm.training.run.build import build_module, weight_seed
from ldm.training.run.captions import caption_templates, reads_captions, refuse_unsaid
from ldm.training.run.checkpoint_io import FolderCheckpointIO
from ldm.training.run.directory import RunDirectory
from ldm.training.run.identity import decisive
from ldm.training.run.logging import RunLogger, last_metrics, silence_advertisements

CAPTIONS_READ = 200_000  # captions that a vocabulary is built from
MOST_CLASSES = 20_000  # more different captions than that are sentences (ImageNet-21k has 21,841 classes; name those)


@dataclass
class Finished:
    """Where a run stands after `train_run`."""

    path: Path
    step: int
    trained: bool  # False: it was finished before
    metrics: dict[str, float]


def train_run(config: dict[str, Any], path_of: Any) -> Finished:
    """Trains what `config` describes until max_steps; goes on where it stopped; does nothing when it is done.

    config: resolved, plain. path_of: (digest) -> run directory, so that the name may hold the digest.
    """
    config = copy.deepcopy(config)
    check_trainer(config["trainer"])
    check_frozen_dtype(config)
    if not config["checkpoint"]:
        has_latents = bool(config["shards"]) and (Path(config["shards"]) / "autoencoder").is_dir()
        check_pretrained(config, needs_autoencoder=not has_latents)
    data = _open_data(config)
    start = _starting_checkpoint(config, data)
    of_diffusion = config["module"] == "latent_diffusion"
    templates = caption_templates(config) if of_diffusion else None
    prior = read_prior(config, start.get("latents", start.get("given"))) if of_diffusion else None
    tokenizer, words = None, start["given"] / "tokenizer" if "given" in start else None
    if config["module"] == "latent_diffusion" and words is not None and words.is_dir():
        tokenizer = _kept_words(start["given"], config["text_encoder"])
    elif config["module"] == "latent_diffusion" and _builds_vocabulary(config["text_encoder"]):
        tokenizer = _tokenizer(_captions(data, templates), config["text_encoder"])
    if config["module"] == "latent_diffusion" and "classes" in config["text_encoder"]:
        config["text_encoder"]["classes"] = _classes(data, templates, config["text_encoder"]["classes"])
    identity = _identity(config, data, start)
    identity |= {k: v.identity for k, v in (("templates", templates), ("prior", prior)) if v is not None}
    directory = RunDirectory(path_of(digest(identity)), config, identity)
    _agree(config, data, identity, tokenizer)
    done = processes.by_first(directory.status)
    step = done.get("step")
    finished = done.get("state") == "finished"
    if finished and isinstance(step, int) and (step >= config["max_steps"] or done.get("stopped_early") is True):
        directory.check_identity()
        metrics = done.get("metrics")
        return Finished(directory.path, step, False, metrics if isinstance(metrics, dict) else {})
    _remark_on_few(data, templates)
    if of_diffusion and "textual_inversion" in (config["adapter"] or {}):
        refuse_unsaid(config["adapter"]["textual_inversion"]["placeholder"], _captions(data, templates))
    torch.manual_seed(weight_seed(config))
    parts = build_components(config, whole=of_diffusion)
    if tokenizer is not None and isinstance(parts.text_encoder, CLIPTokenized):
        parts.text_encoder.set_tokenizer(tokenizer)
    if of_diffusion and "given" in start:
        check_adapters(config, read_config(start["given"]), start["given"])
    states = _fill_from_checkpoints(parts, start, config)
    load_pretrained(parts, set(states))
    if config["frozen_dtype"] != "float32":
        _hold_frozen(config, parts, directory)
    attach_adapters(config, parts, states, start.get("given"))
    return _fit(config, data, build_module(config, parts, prior), parts, directory)


def _open_data(config: dict[str, Any]) -> ShardDataModule:
    """The datamodule; the image size where none was given is the one that prepare found out."""
    data = build(config["data"], "data")
    data.captions_read = reads_captions(config)
    data.setup()
    if data.captions_read:
        data.require_captions()
    config["image_size"] = config["data"]["image_size"] = data.image_size
    if Path(config["shards"]).exists():  # a run is found again from any working directory
        config["shards"] = config["data"]["shards"] = str(Path(config["shards"]).resolve())
    if config.get("class_shards"):
        config["class_shards"] = str(Path(config["class_shards"]).resolve())
    if config["module"] == "autoencoder" and data.kind == "latent":
        raise ConfigError(
            f"shards={config['shards']} holds latents, an autoencoder trains on images: give those shards."
        )
    return data


def _remark_on_few(data: ShardDataModule, templates: Templates | None) -> None:
    """Says what so few pictures mean, on the first process."""
    if data.mode != "index" or not processes.is_first():
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


def _captions(data: ShardDataModule, templates: Templates | None, split: str = "train") -> Iterator[str]:
    """What the text encoder will read."""
    return islice(data.captions(split) if templates is None else templates.all(data.captions(split)), CAPTIONS_READ)


def _builds_vocabulary(node: dict[str, Any]) -> bool:
    """Whether the captions decide the words: not where weights or a tokenizer are given."""
    return "vocab_size" in node and not node.get("pretrained") and not node.get("tokenizer")


def _kept_words(checkpoint: Path, node: dict[str, Any]) -> CLIPTokenizer:
    """The tokenizer of the checkpoint that is started from: its embeddings belong to its words."""
    saved = read_config(checkpoint)["text_encoder"]
    node |= {k: saved[k] for k in ("vocab_size", "max_length") if k in saved and k in node}
    return load_tokenizer(checkpoint / "tokenizer")


def _tokenizer(read: Iterator[str], node: dict[str, Any]) -> CLIPTokenizer:
    """A tokenizer built from the training captions; the node's vocabulary and length become what they need."""
    captions = list(read)
    tokenizer = build_tokenizer(captions, node["vocab_size"])
    longest = max((len(ids) for ids in tokenizer(captions)["input_ids"]), default=2)
    node["vocab_size"] = len(tokenizer)
    node["max_length"] = min(node["max_length"], -(-longest // 8) * 8)
    return tokenizer


def _classes(data: ShardDataModule, templates: Templates | None, given: list[str] | None) -> list[str]:
    """The class names: those given, or the distinct captions of the training data; no caption may be another."""
    captions = {c for c in _captions(data, templates) if c}
    classes = sorted(captions) if given is None else given
    if len(classes) > MOST_CLASSES:
        raise ConfigError(
            f"text_encoder=classes takes captions for class names, and there are {len(classes)} different ones: "
            "choose text_encoder=small, which reads their words, or name text_encoder.classes=[...]."
        )
    if data.mode == "index":
        captions |= {c for c in _captions(data, templates, "val") if c}
    strangers = sorted(captions - set(classes))
    if strangers:
        raise ConfigError(
            f"{len(strangers)} captions of the data are none of the {len(classes)} classes, such as '{strangers[0]}': "
            "name all classes, text_encoder.classes=[...], or choose text_encoder=small, which reads sentences."
        )
    return classes


def _starting_checkpoint(config: dict[str, Any], data: ShardDataModule) -> dict[str, Path]:
    """Checkpoint folders to start from: the one given, and the autoencoder that made the latents."""
    start = {}
    if config["module"] == "latent_diffusion" and data.kind == "latent":
        start["latents"] = find(Path(config["shards"]) / "autoencoder")
    if config["checkpoint"]:
        start["given"] = find(config["checkpoint"])
    if config["module"] == "latent_diffusion" and not start and not config["autoencoder"].get("pretrained"):
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


def _fill_from_checkpoints(parts: Components, start: dict[str, Path], config: dict[str, Any]) -> dict[str, State]:
    """Fills the parts; returns the states of all that the checkpoints hold: vae, unet, text_encoder, adapters."""
    filled: dict[str, State] = {}
    for kind, folder in start.items():
        states = load_parts(folder, config["weights"])
        if kind == "latents":
            states = {"vae": states["vae"]}
        elif "vae" in filled and "vae" in states:
            _check_same_autoencoder(filled["vae"], states["vae"], folder)
        load_states(parts, states, folder)
        filled |= states
    return filled


def _hold_frozen(config: dict[str, Any], parts: Components, directory: RunDirectory) -> None:
    """Casts what is not trained; before that, its original tensors are written for the first checkpoint to link."""
    adapted = bool(config.get("adapter"))

    def keep() -> None:
        directory.open()  # before anything is written into it
        if newest(directory.path, lambda text: None) is None:
            keep_originals(directory.originals, parts, adapted, yaml.safe_dump(config, sort_keys=False))

    processes.by_first(keep)
    cast_frozen(parts, adapted, DTYPES[config["frozen_dtype"]])


def _check_same_autoencoder(ours: State, theirs: State, given: Path) -> None:
    """Latents are only good with the autoencoder that made them."""
    same = ours.keys() == theirs.keys() and all(
        torch.equal(v.nan_to_num(), theirs[k].nan_to_num()) for k, v in ours.items()
    )
    if not same:
        raise ConfigError(
            f"checkpoint={given} holds another autoencoder than the one that encoded these latents: encode them again "
            f"with task=encode checkpoint={given}, or start from a checkpoint trained on them."
        )


def _fit(
    config: dict[str, Any], data: ShardDataModule, module: TrainedModule, parts: Components, directory: RunDirectory
) -> Finished:
    silence_advertisements()
    first = processes.is_first()
    trainer_node, plugins = launched(config["trainer"])
    # All are built, also those of the other stage: what is wrong with one is said before anything is trained.
    built = [build(node, "callbacks") for node in (config["callbacks"] or {}).values()]
    callbacks = [c for c in built if c and isinstance(module, getattr(c, "watches", TrainedModule))]
    trainer_node["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)  # true would add one
    previous = _resumed(directory)
    for callback in callbacks:
        if isinstance(callback, Checkpoints):
            callback.directory = directory.checkpoints
            callback.on_saved = lambda step: directory.set_status("running", step)
    io = FolderCheckpointIO(
        module.parts,
        module.trained_parts,
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        getattr(parts.text_encoder, "save_tokenizer", None),
        previous or (directory.originals if config["frozen_dtype"] != "float32" else None),
    )
    images_per_step = config["batch_size"] * config["accumulate"] * launch().world_size
    loggers: list[Any] = [RunLogger(directory.path, images_per_step)] if first else []
    if first and config["logger"]:
        extra = {"directory": directory.path, "config": config, "images_per_step": images_per_step}
        loggers.append(build(config["logger"], "logger", **extra))
    trainer = build(trainer_node, "trainer", callbacks=callbacks, logger=loggers, plugins=[io, *plugins])
    step = read_manifest(previous)["step"] if previous else 0
    if first:
        loggers[0].forget_after(step)
        directory.event("resume" if previous else "start", step=step)
        directory.set_status("running", step)
        processes.when_lost(lambda line: directory.set_status("stopped", trainer.global_step, reason=line))
    try:
        with opened(trainer):
            trainer.fit(module, datamodule=data, ckpt_path=str(previous) if previous else None)
    except BaseException as error:
        if first:
            with suppress(OSError):  # a full disk takes these neither; it is the first error that is told
                directory.set_status("stopped", trainer.global_step, reason=f"{type(error).__name__}: {error}"[:500])
                directory.event("stop", step=trainer.global_step, reason=type(error).__name__)
        raise
    finally:
        directory.close()

    def finish() -> dict[str, float]:
        metrics = last_metrics(directory.path / "metrics.jsonl")
        early = {"stopped_early": True} if ended_early(trainer) else {}
        directory.set_status("finished", trainer.global_step, metrics=metrics, **early)
        directory.event("finish", step=trainer.global_step)
        return metrics

    return Finished(directory.path, trainer.global_step, True, processes.by_first(finish))


def _agree(config: dict[str, Any], data: ShardDataModule, identity: dict[str, Any], tokenizer: Any) -> None:
    """Before anything is built: all processes see the same data, words and starting weights."""
    facts = {
        "data.fingerprint": data.fingerprint,
        "validation data": data.split("val").fingerprint if data.mode == "index" else None,
        "image_size": config["image_size"],
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())) if tokenizer is not None else None,
        **identity,
    }
    processes.agree(facts, f"all hosts must read the same files (shards={config['shards']}).")


def _resumed(directory: RunDirectory) -> Path | None:
    """The checkpoint to go on from: the first process locks the directory, verifies its files and says which."""

    def found() -> str | None:
        directory.open()
        folder = newest(directory.path, lambda text: print(f"warning: {text}", flush=True))
        return str(folder) if folder else None

    previous = processes.by_first(found)
    return Path(previous) if previous else None
