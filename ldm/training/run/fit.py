"""One training run: from a checked configuration and opened data to a finished run directory."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint

from ldm.build import build
from ldm.checkpoints.components import Components, attach_adapters, check_adapters, load_states
from ldm.checkpoints.folder import State, load_parts, newest, read_config, read_manifest
from ldm.checkpoints.pretrained import load_pretrained
from ldm.config.root import digest
from ldm.errors import ConfigError
from ldm.launch import is_first, launch
from ldm.models.block import compile_network
from ldm.text.encoder import CLIPTokenized
from ldm.training.callbacks.saving import ended_early
from ldm.training.distributed import processes
from ldm.training.distributed.strategy import launched, opened
from ldm.training.module import TrainedModule, is_beside
from ldm.training.run.build import build_module, build_parts, weight_seed
from ldm.training.run.captions import captions_read, refuse_unsaid
from ldm.training.run.checkpoint_io import FolderCheckpointIO
from ldm.training.run.directory import RunDirectory, WritesIntoRun
from ldm.training.run.frozen import DTYPES, cast_frozen, keep_originals
from ldm.training.run.job import Job, agree, remark_on_few, resolve
from ldm.training.run.logging import RunLogger, StepLogger, last_metrics, silence_advertisements


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
    job = resolve(config)
    directory = RunDirectory(path_of(digest(job.identity)), job.config, job.identity)
    agree(job)
    done = processes.by_first(directory.status)
    step = done.get("step")
    finished = done.get("state") == "finished"
    if finished and isinstance(step, int) and (step >= job.config["max_steps"] or done.get("stopped_early") is True):
        directory.check_identity()
        metrics = done.get("metrics")
        return Finished(directory.path, step, False, metrics if isinstance(metrics, dict) else {})
    remark_on_few(job)
    return fit(job, build_job(job, directory), directory)


def build_job(job: Job, directory: RunDirectory) -> TrainedModule:
    """The LightningModule of a run with the weights that it starts from."""
    config, given = job.config, job.start.get("given")
    diffusion = job.kind == "latent_diffusion"
    if diffusion and "textual_inversion" in (config["adapter"] or {}):
        word = config["adapter"]["textual_inversion"]["placeholder"]
        refuse_unsaid(word, captions_read(job.data, job.templates))
    torch.manual_seed(weight_seed(config))
    parts = build_parts(config)
    if job.tokenizer is not None and isinstance(parts.text_encoder, CLIPTokenized):
        parts.text_encoder.set_tokenizer(job.tokenizer)
    if diffusion and given is not None:
        check_adapters(config, read_config(given), given)
    states = _fill_from_checkpoints(parts, job.start, config)
    load_pretrained(parts, set(states))
    if config["frozen_dtype"] != "float32":
        _hold_frozen(config, parts, directory)
    attach_adapters(config, parts, states, given)
    module = build_module(config, parts, job.class_images)
    compile_network(parts.network if diffusion else parts.autoencoder, config["compile"])
    return module


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


def fit(job: Job, module: TrainedModule, directory: RunDirectory) -> Finished:
    """Trains a module until its run's max_steps, from the newest checkpoint of the directory on."""
    config, data = job.config, job.data
    silence_advertisements()
    first = is_first()
    trainer_node, plugins = launched(config["trainer"])
    # All are built, also those of the other stage: what is wrong with one is said before anything is trained.
    built = [build(node, "callbacks") for node in (config["callbacks"] or {}).values()]
    callbacks = [c for c in built if c and is_beside(c, type(module))]
    trainer_node["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)  # true would add one
    previous = _resumed(directory)
    for callback in callbacks:
        if isinstance(callback, WritesIntoRun):
            callback.run_directory = directory
    io = FolderCheckpointIO(
        module.parts,
        module.trained_parts,
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        getattr(getattr(module, "text_encoder", None), "save_tokenizer", None),
        previous or (directory.originals if config["frozen_dtype"] != "float32" else None),
    )
    images_per_step = config["batch_size"] * config["accumulate"] * launch().world_size
    loggers: list[Any] = [RunLogger(directory.path, images_per_step)] if first else []
    if first and config["logger"]:
        extra = {"directory": directory.path, "config": config, "images_per_step": images_per_step}
        loggers.append(build(config["logger"], "logger", **extra))
    trainer = build(trainer_node, "trainer", callbacks=callbacks, logger=loggers, plugins=[io, *plugins])
    for logger in loggers:
        if isinstance(logger, StepLogger):
            logger.trainer = trainer
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
        with suppress(Exception):  # of what a thread still writes; the error is told already
            io.wait()
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


def _resumed(directory: RunDirectory) -> Path | None:
    """The checkpoint to go on from: the first process locks the directory, verifies its files and says which."""

    def found() -> str | None:
        directory.open()
        for left in directory.checkpoints.glob("*.part"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        folder = newest(directory.path, lambda text: print(f"warning: {text}", flush=True))
        return str(folder) if folder else None

    previous = processes.by_first(found)
    return Path(previous) if previous else None
