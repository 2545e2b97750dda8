"""task=prepare: images and captions from a source into shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Output, Pictures, Task


@dataclass
class Prepare(Pictures, Output, Task):
    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes output=DIR (default: outputs/stages/shards-<digest of the source>); says what was left out."""
        from ldm.tasks.work.prepare import prepare

        return prepare(config)
