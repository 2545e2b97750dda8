"""Checkpoints at step boundaries, after the last step, and when the process is asked to stop."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, Timer

from ldm.checkpoints.folder import all_folders, folder_name
from ldm.errors import ConfigError
from ldm.launch import STARTED
from ldm.training.distributed import collectives
from ldm.training.module import TrainedModule, is_last_step, is_optimizer_step, stopped_early
from ldm.training.run.checkpoint_io import FolderCheckpointIO
from ldm.training.run.directory import WritesIntoRun

OUT_OF_TIME = 1  # beside the signals' numbers, and below those that are listened to
PRUNED = 100  # above them: a sweep has no more use for this run


class Interrupted(Exception):
    """A signal, max_hours or a sweep's pruner ended the run at a step boundary; everything up to it is saved."""

    everywhere = True  # in every process, at the same step

    def __init__(self, number: int, step: int, folder: Path):
        by = {OUT_OF_TIME: "stopped by max_hours", PRUNED: "pruned"}.get(number)
        super().__init__(f"{by or f'stopped by {signal.Signals(number).name}'} after step {step}; saved in {folder}")
        self.number, self.step, self.folder = number, step, folder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.number, self.step, self.folder)  # a sweep's arm may run in another process

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 4 for what a sweep pruned, 75 ("try again") for what a scheduler sends."""
        return {signal.SIGINT: 130, PRUNED: 4}.get(self.number, 75)


class Checkpoints(WritesIntoRun, Checkpoint):
    """Saves every `every_n_steps` steps, after the last step, and at the boundary after SIGINT, SIGTERM or SIGUSR1.

    Lightning calls it after all other callbacks: what they log at a step is never missing from a resumed run. Losses
    are read before: nothing is saved of a run whose loss is no longer a number.
    keep_last: how many checkpoint folders stay; None keeps all.
    keep_best: a metric, val/loss say: the checkpoint with its best value stays too; best: lowest or highest.
    keep_every_n_images: of those trained on; the first checkpoint after each multiple stays too.
    signals_every_n_steps: how often several processes ask one another for signals; one alone looks after every step.
    in_background: copies are taken, and a thread writes them while training goes on; false: training waits. Under
        trainer=fsdp, where no process has all, it waits. What is written is the same, and so is what survives a kill:
        a checkpoint counts once it is whole, older ones go after that.
    max_hours: since this process started, stages and arms before this run included; then it stops as by a signal.
    """

    decides = False  # what is trained is the same without it

    def __init__(
        self,
        every_n_steps: int = 1000,
        keep_last: int | None = 2,
        keep_best: str | None = None,
        best: Literal["lowest", "highest"] = "lowest",
        keep_every_n_images: int | None = None,
        signals_every_n_steps: int = 5,
        in_background: bool = True,
        max_hours: float | None = None,
    ):
        if signals_every_n_steps < 1:
            raise ConfigError(f"callbacks.checkpoints.signals_every_n_steps={signals_every_n_steps}: at least 1.")
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"callbacks.checkpoints.keep_last={keep_last}: at least 1; null keeps all.")
        if keep_every_n_images is not None and keep_every_n_images < 1:
            raise ConfigError(f"callbacks.checkpoints.keep_every_n_images={keep_every_n_images}: at least 1, or null.")
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.keep_best, self.best, self.keep_every_n_images = keep_best, best, keep_every_n_images
        self._values: dict[int, float] = {}  # of keep_best, by step
        self.signals_every_n_steps, self.in_background, self.max_hours = signals_every_n_steps, in_background, max_hours
        self._io: FolderCheckpointIO | None = None  # None: another one, of a plain script
        self._signal = 0
        self.pruned = False  # set by another callback: stop at this step, as by a signal
        self._saved = 0  # the step
        self._complete = False  # the newest checkpoint is the run's end, before max_steps
        self._before: dict[int, Any] = {}

    @property
    def directory(self) -> Path:
        return Path("checkpoints") if self.run_directory is None else self.run_directory.checkpoints

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step
        io = trainer.strategy.checkpoint_io
        self._io = io if isinstance(io, FolderCheckpointIO) else None
        if self._io is not None:
            self._io.in_background = self.in_background
        trainer.should_stop = trainer.should_stop or self._complete
        # The handler only sets a flag: collectives inside handlers deadlock when one rank alone gets the signal.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._flag)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_optimizer_step(trainer, batch_idx):
            return
        step = trainer.global_step
        due = is_last_step(trainer) or step % self.every_n_steps == 0
        asks = due or collectives.size() == 1 or step % self.signals_every_n_steps == 0
        # The signal that any process has had: all stop at the same step.
        number = collectives.highest(self._signal or self._out_of_time() or PRUNED * self.pruned) if asks else 0
        if self._io is not None:
            self._io.check()  # a full disk ends the run at the next step
        if number or due:
            folder = self._save(trainer)
            if number:  # after the last step too: what would come after this run must not start
                self._wait()
                raise Interrupted(number, step, folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:  # stopped at the end of an epoch, after the last batch's hooks
            self._save(trainer)
        self._wait()
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def state_dict(self) -> dict[str, Any]:
        return ({"complete": True} if self._complete else {}) | ({"values": self._values} if self._values else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._complete = state_dict.get("complete", False)
        self._values = dict(state_dict.get("values", {}))

    def _save(self, trainer: L.Trainer) -> Path:
        if isinstance(trainer.lightning_module, TrainedModule):
            trainer.lightning_module.read_losses()
        self._saved, self._complete = trainer.global_step, ended_early(trainer)
        folder, step = self.directory / folder_name(self._saved), self._saved
        if self.keep_best in trainer.callback_metrics:
            self._values[step] = float(trainer.callback_metrics[self.keep_best])
        trainer.save_checkpoint(folder)
        if trainer.is_global_zero:
            images = getattr(trainer.lightning_module, "images_per_step", 1)

            def written() -> None:
                self._prune(images)
                if self.run_directory is not None:
                    self.run_directory.set_status("running", step)

            if self._io is not None:
                self._io.afterwards(written)
            else:
                written()
        return folder

    def _wait(self) -> None:
        if self._io is not None:
            self._io.wait()

    def _out_of_time(self) -> int:
        return OUT_OF_TIME if self.max_hours is not None and time.monotonic() - STARTED > 3600 * self.max_hours else 0

    def _flag(self, number: int, frame: Any) -> None:
        self._signal = number

    def _prune(self, images_per_step: int) -> None:
        folders = {int(folder.name.removeprefix("step-")): folder for folder in all_folders(self.directory.parent)}
        kept = set(list(folders)[-self.keep_last :] if self.keep_last else folders)
        values = {step: value for step, value in self._values.items() if step in folders and math.isfinite(value)}
        if values:
            kept.add((min if self.best == "lowest" else max)(values, key=lambda step: values[step]))
        if self.keep_every_n_images:
            passed = [step * images_per_step // self.keep_every_n_images for step in folders]
            kept |= {step for step, now, before in zip(folders, passed, [0, *passed], strict=False) if now > before}
        for step in folders.keys() - kept:
            shutil.rmtree(folders[step], ignore_errors=True)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def ended_early(trainer: L.Trainer) -> bool:
    """Whether a callback has said that the run is complete before max_steps. A Timer says only that time is out."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    return stopped_early(trainer) and not any(t.time_remaining() == 0 for t in timers)
