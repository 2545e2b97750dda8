"""A tiny latent diffusion run in this process: modules, data and callbacks as a real one has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from commands import metrics
from hydra import compose, initialize_config_dir

import ldm.training.run.fit as training_run
from ldm.checkpoints.folder import all_folders
from ldm.config.root import plain
from ldm.config.schema import register
from ldm.data.shards.writer import write_dataset
from ldm.data.sources.shapes import ShapesSource
from ldm.tasks.work.encode import encode_shards
from ldm.training.run.fit import Finished, train_run

CONF = Path(__file__).parents[2] / "conf"
TINY = ["source=shapes", "model=unet_tiny", "autoencoder=kl_tiny", "text_encoder=small_tiny", "trainer=debug"]
TINY += ["logger=none", "batch_size=2", "callbacks.losses.every_n_steps=1", "callbacks.jump_to_x0.num_steps=3"]
TINY += ["callbacks.samples.num_steps=2", "callbacks.samples.num_prompts=2", "callbacks.progress.every_n_steps=1000"]
TINY += ["callbacks.latent_statistics.num_images=16", "data.validation_samples=4"]


def config(*overrides: str) -> dict[str, Any]:
    """A resolved configuration, tiny in every part."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[*TINY, *overrides])
    return plain(composed)


def make_data(folder: Path) -> tuple[Path, Path, Path]:
    """(image shards, autoencoder run, latent shards) in `folder`."""
    source = ShapesSource(count=24, validation=6, unseen=2)
    shards = write_dataset(source, folder / "shards", facts=source.facts, identity=source.identity()).output
    autoencoder = config("module=autoencoder", f"shards={shards}", "max_steps=2", "seed=0")
    run = train_run(autoencoder, lambda digest: folder / "autoencoder").path
    encode = config(f"shards={shards}", f"checkpoint={run}")
    return shards, run, encode_shards(encode, folder / "latents").output


class Spy(L.Callback):
    """Keeps the keys of every batch and can stop the process's training at a point of a step, as a kill would."""

    def __init__(self, die_at: tuple[str, int] | None = None):
        self.die_at = die_at
        self.keys: list[tuple[int, tuple[str, ...]]] = []

    def _maybe_die(self, hook: str, trainer: L.Trainer) -> None:
        if self.die_at == (hook, trainer.global_step):
            raise Killed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.keys.append((trainer.global_step, tuple(batch["key"])))
        self._maybe_die("batch_start", trainer)

    def on_after_backward(self, trainer, pl_module):
        self._maybe_die("backward", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._maybe_die("batch_end", trainer)


@contextmanager
def watched(monkeypatch, spy: L.Callback) -> Iterator[None]:
    """Within the block every run has a spy among its callbacks, before the checkpoint callback."""
    original = training_run.build

    def with_spy(node, path="config", **kwargs):
        if path == "trainer":
            kwargs["callbacks"] = [spy, *kwargs["callbacks"]]
        return original(node, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "build", with_spy)
        yield


def train_watched(settings: dict[str, Any], directory: Path, monkeypatch, spy: L.Callback) -> Finished:
    """train_run with a spy."""
    with watched(monkeypatch, spy):
        return training_run.train_run(settings, lambda digest: directory)


class Killed(BaseException):
    """Stands in for kill -9 inside one process: nothing catches it on the way out."""


def same_when_killed(train: Callable[[str, Spy], Any], root: Path) -> list[Path]:
    """Trains `root`/whole, and `root`/run, which is killed in the backward pass of its fifth step and started again.

    The last checkpoints of both, which are equal to the last bit, as is all that was logged.
    """
    train("whole", Spy())
    with pytest.raises(Killed):
        train("run", Spy(die_at=("backward", 4)))
    train("run", Spy())
    assert metrics(root / "run") == metrics(root / "whole")
    ends = [all_folders(root / name)[-1] for name in ("run", "whole")]
    assert fingerprint(ends[0]) == fingerprint(ends[1])
    return ends


def fingerprint(folder: Path) -> dict[str, str]:
    """Digest of every weight file and of the optimizer state of a checkpoint folder."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*.safetensors"))}
    found = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    assert "state/tensors.safetensors" in found  # the optimizer's
    state = torch.load(folder / "state.pt", weights_only=True)
    return {**found, "ema_updates": str(state.get("ema_updates"))}
