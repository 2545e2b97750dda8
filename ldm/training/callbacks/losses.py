"""Training losses, total and by time, averaged exactly over the steps since they were last logged."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch

from ldm.training.module import TrainedModule, is_optimizer_step
from ldm.training.run.logging import log_metrics


class Losses(L.Callback):
    """Logs the module's totals every `every_n_steps` steps; the sums so far are part of the checkpoint.

    Only then, and before a checkpoint, are they read: in between nothing waits for a device or for other processes.
    """

    decides = False  # what is trained is the same without it

    def __init__(self, every_n_steps: int = 10):
        self.every_n_steps = every_n_steps
        self._module: TrainedModule | None = None
        self._restored: dict[str, torch.Tensor] = {}
        self._rate = math.nan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainedModule)
        self._module, totals = pl_module, pl_module.totals
        for name, sums in self._restored.items():
            if name in totals.names:
                totals.values[totals.names.index(name)] = sums

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._rate = optimizer.param_groups[0]["lr"]  # at the batch's end the schedule is at the next step's already

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainedModule)
        step = trainer.global_step
        if not is_optimizer_step(trainer, batch_idx) or step % self.every_n_steps:
            return
        pl_module.read_losses()
        values = {**pl_module.totals.means(), "train/learning_rate": self._rate}
        log_metrics(trainer, values, step)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)  # for other callbacks
        pl_module.totals.reset()

    def logged(self, module: TrainedModule, max_steps: int) -> list[str]:
        """Names of what a run of `max_steps` logs."""
        return [*module.totals.names, "train/learning_rate"] if max_steps >= self.every_n_steps else []

    def state_dict(self) -> dict[str, Any]:
        """The sums as far as they were read: a checkpoint is saved after that."""
        if self._module is None:
            return {}
        totals = self._module.totals
        return {"sums": {name: sums.clone() for name, sums in zip(totals.names, totals.values, strict=True)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("sums", {})
