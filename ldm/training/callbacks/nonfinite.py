"""Steps whose gradients are no numbers are left out, counted, and their pictures named."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.training.distributed import processes
from ldm.training.module import Diverged, TrainedModule
from ldm.training.run.directory import WritesIntoRun


class SkipNonFinite(WritesIntoRun, L.Callback):
    """Leaves out an optimizer step whose gradients are not finite: weights and the optimizer's state stay as they were.

    The step counts, and events.jsonl names the pictures whose losses were no numbers. More than `in_a_row` of them end
    the run. 0 leaves none out, and then nothing is asked: otherwise each step waits for its device once.
    """

    decides = False  # without it such a run would have ended

    def __init__(self, in_a_row: int = 0):
        if in_a_row < 0:
            raise ConfigError(f"callbacks.skip_nonfinite.in_a_row={in_a_row}: must be at least 0, which skips none.")
        self.in_a_row = in_a_row
        self.skipped, self._row = 0, 0
        self._seen: list[tuple[list[str], Tensor]] = []  # keys and loss of each micro-batch of this step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keys = batch["key"]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.in_a_row:
            self._seen.append((self._keys, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, TrainedModule)
        if not self.in_a_row or pl_module.is_scaled:  # a scaler does so by itself
            return
        seen, self._seen = self._seen, []
        if pl_module.gradient_norm().isfinite():  # equal in all processes: the gradients are their sums
            self._row = 0
            return
        for parameter in pl_module.parameters():
            parameter.grad = None  # an optimizer leaves those alone that have none
        pl_module.totals.drop_step()
        self.skipped, self._row = self.skipped + 1, self._row + 1
        step = trainer.global_step + 1
        guilty = processes.collected([key for keys, loss in seen if not loss.isfinite() for key in keys])
        keys = [key for of_rank in guilty for key in of_rank]
        if trainer.is_global_zero:
            print(
                f"warning: step {step} was left out, its gradients are no numbers ({', '.join(keys)[:200]})", flush=True
            )
            if self.run_directory is not None:
                self.run_directory.event("skip", step=step, skipped=self.skipped, keys=keys)
        if self._row > self.in_a_row:
            raise Diverged(
                f"the gradients of {self._row} steps in a row, up to step {step}, are no numbers "
                f"(callbacks.skip_nonfinite.in_a_row={self.in_a_row}); the last good checkpoint is untouched. "
                "Lower optimizer.lr, raise lr_scheduler.warmup_steps, or use trainer.precision=32-true."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "row": self._row} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._row = state_dict.get("skipped", 0), state_dict.get("row", 0)
