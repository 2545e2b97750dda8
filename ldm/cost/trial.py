"""A few training steps of a configuration on pictures made up here: what they took, to hold a plan against."""

from __future__ import annotations

import copy
import resource
import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ldm.build import build
from ldm.cost.rates import clock
from ldm.data.order import Geometry
from ldm.memory.meta_step import LiveBytes
from ldm.memory.simulated import fresh_module, reads_latents
from ldm.pictures import to_unit
from ldm.text.encoder import CLIPTokenized
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainedModule, is_optimizer_step
from ldm.training.run.logging import silence_advertisements

WARM = 2  # steps before the clock


@dataclass
class Trial:
    """seconds: of a step, the median. bytes: of tensors at the peak, weights included. resident: how far the process'
    own memory grew, None on a GPU."""

    seconds: float
    bytes: int
    resident: int | None


def try_steps(config: Mapping[str, Any], steps: int = 8) -> Trial:
    """Trains a fresh module on the GPU, or on the CPU where there is none, by Lightning, as a run does; nothing is
    written. Validation, pictures and checkpoints are left out, and so is reading data."""
    silence_advertisements()
    on_gpu = torch.cuda.is_available()
    before = resident()
    watch = _fit(config, WARM + steps)
    grown = None if on_gpu else watch.resident - before
    if on_gpu:
        return Trial(statistics.median(watch.seconds), torch.cuda.max_memory_allocated(), grown)
    with LiveBytes("cpu") as live:  # it is slow, so by itself; the second step has the optimizer's state
        _fit(config, 2)
    return Trial(statistics.median(watch.seconds), live.peak, grown)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _fit(config: Mapping[str, Any], steps: int) -> Watch:
    config = copy.deepcopy(dict(config))
    node = {**config["trainer"], "max_steps": steps, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    module, watch = fresh_module(config, "cpu"), Watch()
    module.get_submodule("autoencoder.latents").set(0.0, 1.0)  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    data = MadeUp(config, module)
    trainer = build({**node, "enable_checkpointing": False}, "trainer", callbacks=[watch], logger=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*val_dataloader")
        trainer.fit(module, data)
    return watch


class MadeUp(L.LightningDataModule):
    """One batch of noise, again and again, of the size that a configuration trains on."""

    def __init__(self, config: Mapping[str, Any], module: TrainedModule):
        super().__init__()
        self.geometry = Geometry(config["batch_size"], config["accumulate"])
        size, batch = config["image_size"], config["batch_size"]
        self.batch: dict[str, Any] = {"image": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)}
        if not isinstance(module, LatentDiffusion):
            return
        words = module.text_encoder  # as many as there is room for
        self.batch["caption"] = ["a " * words.max_tokens if isinstance(words, CLIPTokenized) else ""] * batch
        if reads_latents(config, module):
            with torch.no_grad():
                moments = module.autoencoder.encode(to_unit(self.batch.pop("image")[:1])).moments()
            self.batch["latent"] = moments.expand(batch, *moments.shape[1:]).half()

    def train_dataloader(self) -> Iterable[dict[str, Any]]:
        while True:
            yield self.batch


@dataclass
class Watch(L.Callback):
    """Seconds of steps, but for the first ones, and the most memory that was seen in the forward pass or behind it."""

    seconds: list[float] = field(default_factory=list)
    resident: int = 0
    _ended: float = 0.0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self.resident = max(self.resident, resident())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_optimizer_step(trainer, batch_idx):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = clock(pl_module.device.type)
        if trainer.global_step > WARM:
            self.seconds.append(now - self._ended)
        self._ended, self.resident = now, max(self.resident, resident())
