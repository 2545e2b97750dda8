"""Training losses, total and by time, averaged exactly over the steps since they were last logged."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch

from ldm.training.module import TrainedModule, is_optimizer_step
from ldm.training.run.logging import log_metrics
from ldm.training.totals import Totals


class Diverged(RuntimeError):
    """The loss is no longer a number; nothing of this step has been saved."""

    everywhere = True  # the sum over all processes says so in each


class Losses(L.Callback):
    """Logs the module's totals every `every_n_steps` steps; the sums so far are part of the checkpoint."""

    decides = False  # what is trained is the same without it

    def __init__(self, every_n_steps: int = 10):
        self.every_n_steps = every_n_steps
        self.window: Totals | None = None
        self._restored: torch.Tensor | None = None
        self._rate = math.nan
        self.last = math.nan  # loss of the last step, for the progress bar

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModule)
        self.window = Totals(pl_module.totals.names)
        if self._restored is not None:
            self.window.values.copy_(self._restored)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._rate = optimizer.param_groups[0]["lr"]  # at the batch's end the schedule is at the next step's already

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainedModule) and self.window is not None
        if not is_optimizer_step(trainer, batch_idx):
            return
        step = trainer.global_step
        pl_module.totals.reduce()
        self.last = pl_module.totals.means()["train/loss"]
        if not math.isfinite(self.last):
            raise Diverged(
                f"the training loss is {self.last} at step {step}; the last good checkpoint is untouched. "
                "Lower optimizer.lr, raise lr_scheduler.warmup_steps, or use trainer.precision=32-true."
            )
        self.window.merge(pl_module.totals)
        pl_module.totals.reset()
        if step % self.every_n_steps == 0:
            values = {**self.window.means(), "train/learning_rate": self._rate}
            log_metrics(trainer, values, step)
            pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)  # for other callbacks
            self.window.reset()

    def logged(self, module: TrainedModule, max_steps: int) -> list[str]:
        """Names of what a run of `max_steps` logs."""
        return [*module.totals.names, "train/learning_rate"] if max_steps >= self.every_n_steps else []

    def state_dict(self) -> dict[str, Any]:
        return {} if self.window is None else {"window": self.window.values.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("window")
