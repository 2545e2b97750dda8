"""task=evaluate: what a trained model draws, in numbers with their intervals; task=report: all of it as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Batches, Checkpoint, Compiled, Drawn, Output, Scored, Seeded, Shards, Task, key
from ldm.errors import ConfigError


@dataclass
class Evaluate(Scored, Drawn, Compiled, Checkpoint, Shards, Batches, Seeded, Output, Task):
    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes evaluation.json and picture grids into output=DIR, by default beside the checkpoint's run."""
        from ldm.tasks.work.evaluate import evaluate

        return evaluate(config)


@dataclass
class Report(Output, Task):
    checkpoint: str | None = key(None, "directory of a run, whatever became of it, or of a sweep", holds="path")

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes report.html into the directory checkpoint=, or the file output=."""
        from ldm.report.run import write_run
        from ldm.report.sweep import write_sweep

        if not config.checkpoint:
            raise ConfigError("task=report needs checkpoint=, a run's or a sweep's directory: checkpoint=outputs/mine.")
        path = Path(config.checkpoint)
        write = write_sweep if (path / "results.csv").is_file() else write_run
        print(f"report: {write(path, Path(config.output) if config.output else None)}")
        return {}
