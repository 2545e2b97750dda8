"""sweep=optuna: points that Optuna chooses by what the earlier ones gave, asked for and told one by one.

The published plugin, hydra-optuna-sweeper, wants an Optuna before version 3, of 2022; this asks today's.
"""

from __future__ import annotations

import fcntl
import json
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, open_dict

from ldm.errors import ConfigError
from ldm.launch import launch
from ldm.sweep.arms import Arm, record
from ldm.sweep.end import is_lower_better
from ldm.sweep.search import Random, Row, Running
from ldm.sweep.space import Parameter, Point, Space
from ldm.training.callbacks.pruning import PRUNERS, open_study, optuna_or_refuse

REPEATS = 10  # draws of points that were there, after which one is drawn at random
AGAIN = ("failed", "interrupted", "running")  # states of points that the same command tries once more


class Optuna(Random):
    """Asks Optuna for points and tells it the mean of optimized_metric over seed=; goes on where it stopped.

    n_trials: points, counted over all commands of this sweep. n_jobs: arms side by side; so many are asked for at once.
    sampler: tpe learns; random does not. direction: minimize or maximize; null goes by the metric's name.
    pruned_by: a logged metric; an arm whose value at some step is worse than the others' were is stopped there.
    pruner: median, halving or hyperband. startup_trials: arms before the first is pruned; warmup_steps: steps (median).
    storage: of the study, an URL of SQLAlchemy's; null is study.db in the sweep's folder.

    What is refused, failed, or has no finite value counts as pruned: worse than all others, so it is not asked for
    again and again. A failed point is tried once more by the next command.
    """

    grows = True

    def __init__(
        self,
        n_trials: int = 20,
        n_jobs: int = 1,
        seed: int = 0,
        sampler: Literal["tpe", "random"] = "tpe",
        direction: Literal["minimize", "maximize"] | None = None,
        pruned_by: str | None = None,
        pruner: Literal["median", "halving", "hyperband"] = "median",
        startup_trials: int = 5,
        warmup_steps: int = 0,
        storage: str | None = None,
    ):
        super().__init__(n_trials, n_jobs, seed)
        self.sampler, self.direction, self.storage = sampler, direction, storage
        self.pruned_by, self.pruner = pruned_by, pruner
        self.startup_trials, self.warmup_steps = startup_trials, warmup_steps

    def check(self, metric: str | None) -> None:
        optuna_or_refuse()
        if not metric:
            raise ConfigError("sweep=optuna needs what to optimise: optimized_metric=val/loss, say.")
        if launch().world_size > 1:
            raise ConfigError(
                f"sweep=optuna asks in one process, and {launch().by} has started {launch().world_size}: python -m "
                "ldm.run ... trainer.devices=N starts those of each arm."
            )

    def run(self, space: Space, running: Running) -> None:
        if not space.parameters:
            raise ConfigError("sweep=optuna: nothing is searched. Add a key, optimizer.lr='interval(1e-4,1e-2)' say.")
        self._space, self._running, self._rng = space, running, random.Random(self.seed)
        with (running.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{running.folder} is in use by another command of this sweep: wait for it, or give another name=."
                ) from None
            self._open()
            self._search()

    def _search(self) -> None:
        space = self._space
        known, again = self._earlier()
        for point in again:
            self._study.enqueue_trial(point)
        while (left := min(self.n_trials, space.size) - len(known)) > 0:
            batch = []
            for _ in range(int(min(left, math.ceil(self.n_jobs / max(1, len(space.seeds)))))):
                batch.append(self._ask(known))
                known.add(_key(batch[-1].params))
            self._run(batch)

    def watch(self, config: DictConfig, arm: Arm) -> None:
        if not self.pruned_by or "callbacks" not in config:
            return
        told: dict[str, Any] = {"study": arm.sweep.name, "storage": self._storage(arm.sweep), "metric": self.pruned_by}
        told |= {"pruner": self.pruner, "startup_trials": self.startup_trials, "warmup_steps": self.warmup_steps}
        with open_dict(config):
            target = "ldm.training.callbacks.pruning.Pruning"
            config.callbacks = {**(config.callbacks or {}), "pruning": {"_target_": target, **told}}

    def _storage(self, folder: Path) -> str:
        return self.storage or f"sqlite:///{folder.resolve() / 'study.db'}"

    def _open(self) -> None:
        optuna, folder, metric = optuna_or_refuse(), self._running.folder, self._running.metric
        assert metric is not None
        lower = is_lower_better(metric, self.direction)
        direction, storage = "minimize" if lower else "maximize", self._storage(folder)
        pruner = PRUNERS[self.pruner](optuna, self.startup_trials, self.warmup_steps)
        study = open_study(folder.name, storage, pruner, direction)
        drawn = len(study.trials)  # another seed for what comes after: or the same points would be drawn again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is called experimental
            tpe = optuna.samplers.TPESampler(seed=self.seed + drawn, constant_liar=self.n_jobs > 1)
        study.sampler = tpe if self.sampler == "tpe" else optuna.samplers.RandomSampler(self.seed + drawn)
        self._study, self._distributions = study, {p.key: _distribution(optuna, p) for p in self._space.parameters}
        spans = {k: json.loads(optuna.distributions.distribution_to_json(d)) for k, d in self._distributions.items()}
        facts = {"metric": metric, "direction": direction, "parameters": spans}
        before = study.user_attrs.get("ldm")
        if before is None and not study.trials:
            study.set_user_attr("ldm", facts)
        elif before != facts or study.direction.name.lower() != direction:
            changed = [k for k, v in facts.items() if (before or {}).get(k) != v]
            raise ConfigError(
                f"{storage} holds a study {folder.name!r} of another {' and '.join(changed) or 'direction'}: give "
                "another name= or sweep.storage=, or delete it."
            )

    def _earlier(self) -> tuple[set[Any], list[Point]]:
        """The points that are done with, and those to be tried once more."""
        known, again = set(), dict[Any, Point]()
        for trial in self._study.trials:
            if not trial.params or trial.user_attrs.get("state") == "repeated":
                continue
            if not trial.state.is_finished():  # of a command that was killed
                self._study.tell(trial.number, state=_state("FAIL"))
            if trial.user_attrs.get("state", "running") in AGAIN:
                again[_key(trial.params)] = trial.params
            else:
                known.add(_key(trial.params))
        return known, [p for k, p in again.items() if k not in known]

    def _ask(self, known: set[Any]) -> Any:
        """A trial whose point is new. Samplers may draw a point for ever that they were told nothing good of."""
        for _ in range(REPEATS):
            trial = self._study.ask(self._distributions)
            if _key(trial.params) not in known:
                return trial
            trial.set_user_attr("state", "repeated")
            self._study.tell(trial, state=_state("FAIL"))
        while _key(point := self._space.draw(self._rng)) in known:
            pass
        self._study.enqueue_trial(point)
        return self._study.ask(self._distributions)

    def _run(self, batch: Sequence[Any]) -> None:
        arms = [self._space.arms(trial.params) for trial in batch]
        for trial, replicates in zip(batch, arms, strict=True):
            trial.set_user_attr("arm", self._running.arm(replicates[0]).directory.name)
        firsts = self._running.run([replicates[0] for replicates in arms])
        # The other seeds of a point are for what its first one is no use for.
        followed = [first["state"] == "finished" or not self.pruned_by for first in firsts]
        rest = [arm for replicates, yes in zip(arms, followed, strict=True) if yes for arm in replicates[1:]]
        others = iter(self._running.run(rest))
        for trial, replicates, first, yes in zip(batch, arms, firsts, followed, strict=True):
            rows = [first]
            for overrides in replicates[1:]:
                if not yes:
                    said = f"its first seed was {first['state']}"
                    record(self._running.arm(overrides), first["state"], {}, said)
                else:
                    rows.append(next(others))
            self._tell(trial, rows)

    def _tell(self, trial: Any, rows: Sequence[Row]) -> None:
        states, metric = {row["state"] for row in rows}, self._running.metric
        values = [row["metrics"].get(metric) for row in rows]
        state = next((s for s in ("failed", "interrupted", "refused", "pruned") if s in states), "finished")
        trial.set_user_attr("state", state)
        if state == "finished" and all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            self._study.tell(trial, sum(values) / len(values))
        else:
            self._study.tell(trial, state=_state("PRUNED"))


def _state(name: str) -> Any:
    return optuna_or_refuse().trial.TrialState[name]


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(sorted(point.items()))


def _distribution(optuna: Any, parameter: Parameter) -> Any:
    kinds = optuna.distributions
    if parameter.choices:
        return kinds.CategoricalDistribution(parameter.choices)
    if parameter.whole:
        return kinds.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.log)
