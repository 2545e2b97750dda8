"""Snapshots of averaged weights, from which averages of other lengths are made after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L

from ldm.checkpoints.averages import write_snapshot
from ldm.formats.files.store import gather
from ldm.training.ema import PowerEMA
from ldm.training.module import TrainedModule, is_due
from ldm.training.run.checkpoint_io import under
from ldm.training.run.directory import WritesIntoRun
from ldm.training.run.frozen import DTYPES


class AverageSnapshots(WritesIntoRun, L.Callback):
    """Writes the averages of ema=power into RUN/averages every n steps and after the last; nothing with another ema.

    dtype: of the files; float16 halves them and rounds by 5e-4 of each number, of which a mixture sees a little more.
    """

    decides = False  # what is trained is the same without it

    def __init__(self, every_n_steps: int = 500, dtype: Literal["float32", "float16"] = "float32"):
        self.every_n_steps, self.dtype = every_n_steps, DTYPES[dtype]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainedModule)
        ema = pl_module.ema
        if not isinstance(ema, PowerEMA) or not is_due(trainer, batch_idx, self.every_n_steps):
            return
        pl_module.read_losses()  # of a run that has diverged nothing is written
        run = Path(".") if self.run_directory is None else self.run_directory.path
        for length, shadow in zip(ema.lengths, ema.shadows, strict=True):
            parts = {part: under(shadow, pl_module.parts[part]) for part in pl_module.trained_parts}
            named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
            if trainer.is_global_zero:
                write_snapshot(run, trainer.global_step, length, named, self.dtype)
            else:
                gather(named, self.dtype)
