"""task=report: a run, or a sweep, as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ldm.config.keys import Output, Task, key
from ldm.errors import ConfigError


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
        path = write(path, Path(config.output) if config.output else None)
        print(f"report: {path}")
        return {}
