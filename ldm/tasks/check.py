"""task=check: whether a data set is sound, before a run finds out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ldm.config.keys import Output, Shards, Task
from ldm.config.root import plain
from ldm.errors import ConfigError


@dataclass
class Check(Shards, Output, Task):
    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Scans shards=PATH, compares digests, decodes every sample; ConfigError when it is not sound."""
        from ldm.config.check import check
        from ldm.data.check import check_dataset
        from ldm.data.fields import fields_of
        from ldm.data.shards.splits import find_tars, splits
        from ldm.training.run.directory import write_json

        check(config)
        if not config.shards:
            raise ConfigError("task=check needs shards=PATH.")
        if not splits(Path(config.shards)):
            find_tars(config.shards)  # a path without tars is refused by name
        report = check_dataset(config.shards, fields=fields_of(plain(config.data)))
        if config.output:
            Path(config.output).mkdir(parents=True, exist_ok=True)
            write_json(Path(config.output) / "report.json", report.as_dict())
        print(report)
        if not report.ok:
            first = (report.damaged or [f"{b['shard']} {b['key']}: {b['detail']}" for b in report.bad])[0]
            raise ConfigError(
                f"{config.shards} is not sound: {len(report.damaged)} damaged shards, {len(report.bad)} bad samples "
                f"(first: {first}). Make it again with task=prepare, or let a run replace bad samples: data.max_bad=N."
            )
        return {f"samples/{name or 'all'}": float(n) for name, n in report.samples.items()}
