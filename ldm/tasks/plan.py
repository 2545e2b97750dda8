"""task=plan: what a training configuration takes on a GPU, before it is bought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Output, key
from ldm.tasks.train import Train


@dataclass
class Plan(Output, Train):
    processes: int = key(1, "how many train together, and share pictures and, with trainer=fsdp, the model", least=1)

    in_every_process: ClassVar[bool] = False

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Prints the table, the total and the cards that it fits; writes output=FILE (csv) where one is given."""
        from ldm.tasks.work.plan import plan

        return plan(config)
