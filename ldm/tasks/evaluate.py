"""task=evaluate: what a trained model draws, in numbers with their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Batches, Checkpoint, Compiled, Drawn, Output, Scored, Seeded, Shards, Task


@dataclass
class Evaluate(Scored, Drawn, Compiled, Checkpoint, Shards, Batches, Seeded, Output, Task):
    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes evaluation.json and picture grids into output=DIR, by default beside the checkpoint's run."""
        from ldm.tasks.work.evaluate import evaluate

        return evaluate(config)
