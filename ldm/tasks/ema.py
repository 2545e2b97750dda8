"""task=ema: averaged weights of any length, from the snapshots of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from ldm.config.keys import key
from ldm.tasks.evaluate import Evaluate


@dataclass
class Ema(Evaluate):
    length: Any = key(0.1, "deviation of the average in units of training, or a list of them, which are then scored")

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes a checkpoint folder for each length= into output=, by default RUN/lengths; of several also a curve."""
        from ldm.tasks.work.lengths import make_lengths

        return make_lengths(config)
