"""task=merge: checkpoints and LoRAs combined into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from ldm.config.keys import Output, Stored, Task, Weights, key
from ldm.config.root import plain
from ldm.errors import ConfigError


@dataclass
class Merge(Stored, Weights, Output, Task):
    checkpoints: Any = key(
        None, "list of what is merged, in any layout; the first is what others are added to", holds="paths"
    )
    method: str = key("sum", "sum, add_difference (A + ratio (B - C)), lora (A and LoRAs) or extract (a LoRA)")
    ratios: Any = key(None, "list of weights: a checkpoint, a difference or a LoRA each; default: a mean, 1, 1")
    rank: int | None = key(None, "of an extracted LoRA, or what a sum of LoRAs is cut down to")

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Reads checkpoints=[A,B,...], combines them as method= says, writes output= in format=."""
        from ldm.checkpoints.merge import merge
        from ldm.config.check import check, fits

        check(config)
        given = plain(config)
        for name, example in (("checkpoints", "[outputs/mine,other.safetensors]"), ("output", "PATH")):
            if not given[name]:
                raise ConfigError(f"task=merge needs {name}=, for example {name}={example}.")
        for name, kind, example in (("checkpoints", list[str], "[A,B]"), ("ratios", list[float] | None, "[0.7,0.3]")):
            if not fits(given[name], kind):
                raise ConfigError(f"{name}={given[name]}: give a list in brackets, for example {name}={example}.")
        names = ("checkpoints", "output", "method", "ratios", "format", "dtype", "rank", "weights", "config")
        print(f"merged: {merge(**{name: given[name] for name in names})}")
        return {}
