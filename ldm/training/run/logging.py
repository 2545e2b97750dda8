"""What a run says of itself: metrics.jsonl and images/ are the truth, W&B is a mirror."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from ldm.untrusted import records

log = logging.getLogger(__name__)


class StepLogger(Logger):
    """A logger whose lines stand at the number of optimizer steps made, those of `pl_module.log` too.

    Lightning writes the latter itself: with an epoch, and at a count of its own that is one step behind within a step.
    """

    trainer: L.Trainer | None = None  # set when there is one

    def steps_made(self, metrics: Mapping[str, float], step: int | None) -> int:
        return self.trainer.global_step if self.trainer is not None and "epoch" in metrics else step or 0


class RunLogger(StepLogger):
    """One flushed JSON line a record in metrics.jsonl; every picture as images/step-N_key.png."""

    def __init__(self, directory: Path, images_per_step: int = 1):
        super().__init__()
        self.directory = directory
        self.images_per_step = images_per_step
        self.not_finite: set[str] = set()  # scalars that were no numbers, and have been named

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def version(self) -> str:
        return ""

    @property
    def file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = self.steps_made(metrics, step)
        for key in [k for k, v in metrics.items() if not math.isfinite(v) and k not in self.not_finite]:
            log.warning("%s is %s at step %s: null in %s. This is said once.", key, metrics[key], step, self.file)
            self.not_finite.add(key)
        record = {"step": step, "images": step * self.images_per_step, "time": time.time()}
        record.update({k: float(v) if math.isfinite(v) else None for k, v in metrics.items() if k != "epoch"})
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def log_picture(self, key: str, image: Image.Image, step: int, caption: str = "") -> None:
        folder = self.directory / "images"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:08d}_{key.replace('/', '_')}.png"
        image.save(path)
        record = {"step": step, "key": key, "file": path.name, "caption": caption}
        with (folder / "images.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops what was logged after the checkpoint that a run goes on from: those steps come again."""
        for file in (self.file, self.directory / "images" / "images.jsonl"):
            if file.is_file():
                lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
                part = file.with_name(file.name + ".part")
                part.write_text("".join(f"{ln}\n" for ln in lines if _step_of(ln) <= step), encoding="utf-8")
                os.replace(part, file)
        for picture in (self.directory / "images").glob("step-*.png"):
            if picture.name[5:13].isdecimal() and int(picture.name[5:13]) > step:
                picture.unlink()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # torn when the process was killed
        return math.inf


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """To every logger, from the first process only."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=step)


def log_picture(trainer: L.Trainer, key: str, image: Image.Image, step: int, caption: str = "") -> None:
    """To every logger that takes pictures, from the first process only."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if hasattr(logger, "log_picture"):
                logger.log_picture(key, image, step, caption)


def last_metrics(file: Path) -> dict[str, float]:
    """The last value of every scalar in a metrics.jsonl."""
    latest: dict[str, float] = {}
    for record in records(file):
        latest.update({k: v for k, v in record.items() if k not in ("step", "time", "images")})
    return latest


def silence_advertisements() -> None:
    """Silences what says nothing about this run: Lightning's own lines, and a deprecation inside it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 convolutions: it costs nothing
    warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode")  # the frozen parts, on purpose
