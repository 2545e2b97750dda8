"""task=convert: a checkpoint from any layout into another, or an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ldm.config.keys import Checkpoint, Output, Stored, Task
from ldm.errors import ConfigError


@dataclass
class Convert(Stored, Checkpoint, Output, Task):
    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Reads checkpoint=, writes output= in format=; the suffix of a compvis file chooses .safetensors or .ckpt."""
        from ldm.checkpoints.adapters import ADAPTER_FORMATS, convert_adapter, is_adapter
        from ldm.checkpoints.load import load_any
        from ldm.checkpoints.save import FORMATS, check_target, save_any
        from ldm.config.check import check

        check(config)
        for key, example in (
            ("checkpoint", "outputs/mine"),
            ("format", "|".join((*FORMATS, *ADAPTER_FORMATS))),
            ("output", "PATH"),
        ):
            if not config[key]:
                raise ConfigError(f"task=convert needs {key}=, for example {key}={example}.")
        if is_adapter(config.checkpoint) or config.format in ADAPTER_FORMATS:
            convert_adapter(config.checkpoint, Path(config.output), config.format, config.dtype, config.weights)
            print(f"converted: {config.output}")
            return {}
        check_target(Path(config.output), config.format, config.dtype)  # before gigabytes are read
        loaded = load_any(config.checkpoint, config.weights, config.config)
        save_any(loaded, config.output, config.format, config.dtype)
        print(f"converted: {config.output}")
        own = {k: loaded.config.get(k) for k in ("num_steps", "guidance", "guidance_rescale")}
        if config.format != "ldm" and any(v is not None for v in own.values()):  # no such format has a place for them
            said = " ".join(f"{k}={v}" for k, v in own.items() if v is not None)
            print(f"it was trained and pictured with {said}, which {config.format} does not carry: give them again.")
        return {}
