"""Validation at a fixed number of steps, on averaged weights, reduced exactly over ranks."""

from __future__ import annotations

from typing import Any

import lightning as L

from ldm.training.module import TrainedModule, is_due
from ldm.training.run.logging import log_metrics, log_picture
from ldm.training.totals import Totals


class Validation(L.Callback):
    """Averages the module's `validation_values` over the datamodule's validation data.

    It stands before the checkpoint callback, inside the same training step: a killed run cannot have a checkpoint
    whose validation is missing. That is why Lightning's own validation loop, which comes after the step, is not used;
    other callbacks (EarlyStopping with monitor=val/loss) get its hooks here, with the values in `callback_metrics`.
    """

    decides = False  # what is trained is the same without it

    def __init__(self, every_n_steps: int = 500):
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not is_due(trainer, batch_idx, self.every_n_steps):
            return
        assert isinstance(pl_module, TrainedModule)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_validation_start(trainer, pl_module)
        values = validate(trainer, pl_module)
        log_metrics(trainer, values, step)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)
        for key, picture in pl_module.validation_pictures(values).items():
            log_picture(trainer, key, picture, step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_validation_end(trainer, pl_module)

    def logged(self, module: TrainedModule, max_steps: int) -> list[str]:
        """Names of what a run of `max_steps` logs."""
        return [*module.validation_names(), "val/loss_standard_error"]


def validate(trainer: L.Trainer, module: TrainedModule) -> dict[str, float]:
    """Means over the validation data of every rank, and the standard error of the loss."""
    totals = Totals(module.validation_names())
    loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    with module.averaged():
        for index, batch in enumerate(loader):
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.val_step_context():
                values = module.validation_values(batch, index)
            for name, per_sample in values.items():
                totals.add(name, per_sample, batch["valid"])
    totals.reduce()
    return {**totals.means(), "val/loss_standard_error": totals.standard_errors().get("val/loss", 0.0)}
