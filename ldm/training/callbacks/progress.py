"""How far, how fast, how long still."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.training.module import TrainedModule, is_due, is_optimizer_step
from ldm.training.run.logging import log_metrics


class ProgressBar(L.Callback):
    """One bar over all steps with loss, images/s and time left; in a log file a line every `every_n_steps` steps."""

    decides = False  # what is trained is the same without it

    def __init__(self, every_n_steps: int = 50):
        self.every_n_steps = every_n_steps
        self._bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._first = time.perf_counter(), trainer.global_step
        self._since, self._since_step = self._started, self._first
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=self._first, text="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainedModule)
        due = is_due(trainer, batch_idx, self.every_n_steps)
        if due:
            pl_module.read_losses()  # in all processes
        if not is_optimizer_step(trainer, batch_idx) or not trainer.is_global_zero:
            return
        step, now = trainer.global_step, time.perf_counter()
        if self._bar is not None:
            rate = pl_module.images_per_step * (step - self._first) / (now - self._started)
            self._bar.update(self._task, completed=step, text=f"loss {pl_module.last_loss:.4f}  {rate:.0f} images/s")
        if due:
            steps = step - self._since_step
            rate = pl_module.images_per_step * steps / (now - self._since)
            log_metrics(trainer, {"train/images_per_second": rate}, step)
            if self._bar is None:
                self._print(trainer, pl_module, rate, (now - self._since) / max(1, steps))
            self._since, self._since_step = now, step

    def logged(self, module: TrainedModule, max_steps: int) -> list[str]:
        """Names of what a run of `max_steps` logs."""
        return ["train/images_per_second"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _print(self, trainer: L.Trainer, module: TrainedModule, rate: float, seconds: float) -> None:
        step = trainer.global_step
        left = (trainer.max_steps - step) * seconds
        print(
            f"step {step}/{trainer.max_steps}  images {step * module.images_per_step}  loss {module.last_loss:.4f}  "
            f"{rate:.0f} images/s  {int(left // 60)}:{int(left % 60):02d} left",
            flush=True,
        )

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
