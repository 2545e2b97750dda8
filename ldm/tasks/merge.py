"""task=merge: checkpoints and LoRAs combined into one."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ldm.checkpoints.merge import merge
from ldm.config.check import check, fits
from ldm.config.root import plain
from ldm.errors import ConfigError


def merge_task(config: DictConfig, arm: Path | None = None) -> dict[str, float]:
    """Reads checkpoints=[A,B,...], combines them as method= says, writes output= in format=."""
    check(config)
    given = plain(config)
    for key, example in (("checkpoints", "[outputs/mine,other.safetensors]"), ("output", "PATH")):
        if not given[key]:
            raise ConfigError(f"task=merge needs {key}=, for example {key}={example}.")
    for key, kind, example in (("checkpoints", list[str], "[A,B]"), ("ratios", list[float] | None, "[0.7,0.3]")):
        if not fits(given[key], kind):
            raise ConfigError(f"{key}={given[key]}: give a list in brackets, for example {key}={example}.")
    keys = ("checkpoints", "output", "method", "ratios", "format", "dtype", "rank", "weights", "config")
    print(f"merged: {merge(**{key: given[key] for key in keys})}")
    return {}
