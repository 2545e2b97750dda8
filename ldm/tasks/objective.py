"""task=objective: what the chosen scheduler, parameterization, weighting and times ask for, as a table and a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Diffused, Output, Task, Walked


@dataclass
class Objective(Diffused, Walked, Output, Task):
    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Prints the tables and findings, and writes objective.csv and objective.png into output=DIR."""
        from ldm.tasks.work.objective import objective

        return objective(config)
