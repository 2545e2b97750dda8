"""Tells an Optuna study how an arm of a sweep is doing, and stops the arm where the study says that it is no use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L

from ldm.errors import ConfigError
from ldm.training.callbacks.saving import Checkpoints
from ldm.training.module import is_last_step, is_optimizer_step
from ldm.training.run.directory import WritesIntoRun
from ldm.untrusted import records

PRUNERS: dict[str, Callable[[Any, int, int], Any]] = {  # of Optuna's module, startup trials, warm-up steps
    "median": lambda o, trials, steps: o.pruners.MedianPruner(n_startup_trials=trials, n_warmup_steps=steps),
    "halving": lambda o, trials, steps: o.pruners.SuccessiveHalvingPruner(),
    "hyperband": lambda o, trials, steps: o.pruners.HyperbandPruner(),
}


def optuna_or_refuse() -> Any:
    """Optuna's module. ConfigError, with the install line, where it is missing."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep=optuna needs Optuna: pip install 'ldm[optuna]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(name: str, storage: str, pruner: Any, direction: str | None = None) -> Any:
    """A study, made where there is none and a direction is given. ConfigError for a storage that cannot be opened."""
    optuna = optuna_or_refuse()
    try:
        if direction is None:
            return optuna.load_study(study_name=name, storage=storage, pruner=pruner)
        return optuna.create_study(
            study_name=name, storage=storage, pruner=pruner, direction=direction, load_if_exists=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"sweep.storage={storage} cannot be opened ({reason}): give another.") from None


class Pruning(WritesIntoRun, L.Callback):
    """Reports `metric` at every step at which it is in metrics.jsonl, whoever logged it there.

    A sweep adds it to its arms (sweep.pruned_by=). study, storage: Optuna's; the trial is the one that runs and whose
    `arm` is this run's directory: other runs, a stage's say, are left alone. The rest as in conf/sweep/optuna.yaml.
    """

    decides = False  # what is trained is the same without it, as far as it is trained

    def __init__(
        self,
        study: str,
        storage: str,
        metric: str,
        pruner: str = "median",
        startup_trials: int = 5,
        warmup_steps: int = 0,
    ):
        self.study, self.storage, self.metric = study, storage, metric
        self.pruner, self.startup_trials, self.warmup_steps = pruner, startup_trials, warmup_steps
        self._trial: Any = None
        self._read = 0  # bytes of metrics.jsonl
        self._reported: set[int] = set()  # steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.run_directory is None or not trainer.is_global_zero:
            return
        optuna = optuna_or_refuse()
        study = open_study(
            self.study, self.storage, PRUNERS[self.pruner](optuna, self.startup_trials, self.warmup_steps)
        )
        running = (optuna.trial.TrialState.RUNNING,)
        mine = [t for t in study.get_trials(False, running) if t.user_attrs.get("arm") == self.run_directory.path.name]
        if mine:
            self._checkpoints(trainer)
            self._trial = optuna.trial.Trial(study, mine[-1]._trial_id)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trial is None or self.run_directory is None or not is_optimizer_step(trainer, batch_idx):
            return
        file = self.run_directory.path / "metrics.jsonl"
        if not file.is_file() or file.stat().st_size == self._read:
            return
        self._read = file.stat().st_size
        values = {r["step"]: r[self.metric] for r in records(file) if r.get(self.metric) is not None}
        new = {step: value for step, value in values.items() if step not in self._reported}
        for step, value in new.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a step that was reported before this run was stopped
                self._trial.report(value, step)
        self._reported |= new.keys()
        if new and not is_last_step(trainer) and self._trial.should_prune():
            self._checkpoints(trainer).pruned = True

    def _checkpoints(self, trainer: L.Trainer) -> Checkpoints:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                return callback
        raise ConfigError("sweep.pruned_by= stops arms by callbacks.checkpoints: leave that on.")
