"""How a sweep chooses its points: all of them, or random ones. `ldm.sweep.optuna` learns from those that were there.

A search is what conf/sweep holds; `ldm.sweep.sweeper` hands it the space and runs the arms of the points that it asks
for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from ldm.errors import ConfigError
from ldm.sweep.arms import Arm
from ldm.sweep.space import Point, Space

Row = dict[str, Any]  # of results.jsonl: state, metrics, message ...


class Running(Protocol):
    """What runs arms for a search."""

    folder: Path  # of the sweep
    metric: str | None  # optimized_metric=

    def run(self, arms: Sequence[list[str]]) -> list[Row]:
        """Runs arms, given by their overrides, to their ends: their rows."""
        ...

    def arm(self, overrides: Sequence[str]) -> Arm:
        """An arm as it is when it runs."""
        ...


class Search:
    """n_jobs: arms that run side by side, under hydra/launcher=processes, joblib or submitit_slurm."""

    finite = False  # it tries all that there is, so there must be an end of it
    grows = False  # the same command may ask for other arms than the last time

    def __init__(self, n_jobs: int = 1):
        if n_jobs < 1:
            raise ConfigError(f"sweep.n_jobs={n_jobs}: at least 1.")
        self.n_jobs = n_jobs

    def check(self, metric: str | None) -> None:
        """ConfigError for what cannot be searched, before anything runs."""

    def run(self, space: Space, running: Running) -> None:
        """Asks for arms until it has had enough."""
        raise NotImplementedError

    def watch(self, config: DictConfig, arm: Arm) -> None:
        """Adds to an arm's configuration what it is watched with."""


class Grid(Search):
    """Every combination of the choices, in the order typed."""

    finite = True


class Random(Search):
    """Points drawn evenly from choices and intervals, by a seed: the same command draws the same ones again.

    n_trials: points, each with every seed=. seed: of the draws, not of the runs.
    """

    def __init__(self, n_trials: int = 20, n_jobs: int = 1, seed: int = 0):
        super().__init__(n_jobs)
        if n_trials < 1:
            raise ConfigError(f"sweep.n_trials={n_trials}: at least 1.")
        self.n_trials, self.seed = n_trials, seed

    def run(self, space: Space, running: Running) -> None:
        rng, points = random.Random(self.seed), dict[tuple[Any, ...], Point]()
        while len(points) < min(self.n_trials, space.size):
            point = space.draw(rng)
            points.setdefault(tuple(point.values()), point)
        running.run([arm for point in points.values() for arm in space.arms(point)])
