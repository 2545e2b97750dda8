"""One training run of a command, and what leaves it when it is over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.atomic import atomic_write
from ldm.checkpoints.adapters import save_adapters
from ldm.checkpoints.folder import folder_name, run_of
from ldm.checkpoints.load import load_any
from ldm.checkpoints.save import save_any
from ldm.config.check import module_kind
from ldm.errors import ConfigError
from ldm.launch import is_first
from ldm.sweep.arms import Arm
from ldm.sweep.measured import check_kept
from ldm.training.callbacks.saving import Interrupted
from ldm.training.distributed import processes
from ldm.training.run.fit import Finished, train_run


def trained(config: DictConfig, values: dict[str, Any]) -> Finished:
    """One run, and what leaves it; also when a signal ends it before its last step."""
    check_kept(values)
    try:
        finished = train_run(values, lambda digest: _directory(config, digest))
    except Interrupted as stop:
        folder = stop.folder  # bound here: `stop` is gone after this block
        processes.by_first(lambda: _export(config, folder))
        raise
    say(finished)
    processes.by_first(lambda: _export(config, finished.path / "checkpoints" / folder_name(finished.step)))
    return finished


def _export(config: DictConfig, checkpoint: Path) -> None:
    """The run's adapters, else its whole model, in export/; a refusal is printed, not raised. Older exports go."""
    if not config.export or module_kind(config) != "latent_diffusion":
        return
    run = run_of(checkpoint)
    whole = not config.adapter and config.export == "compvis"
    target = run / "export" / (checkpoint.name + (".safetensors" if whole else ""))
    try:
        if not target.exists():
            loaded = load_any(checkpoint)
            if loaded.adapters:
                with atomic_write(target) as part:
                    save_adapters(loaded.adapters, part, run.name)
            else:
                save_any(loaded, target, config.export)
        for older in set(target.parent.glob("step-*")) - {target}:
            shutil.rmtree(older) if older.is_dir() else older.unlink()
        for path in sorted(target.iterdir()) if config.adapter else [target]:
            print(f"export: {path}")
    except (ConfigError, OSError) as error:
        print(f"not exported: {error} Later: python -m ldm.run task=convert checkpoint={run} format= output=")


def _directory(config: DictConfig, digest: str) -> Path:
    arm = Arm.current()
    if arm is not None:
        return arm.directory
    return Path(config.outputs) / (config.name or f"{config.experiment}-{digest}-seed{config.seed}")


def say(finished: Finished) -> None:
    did = "trained to" if finished.trained else "was finished before, at"
    if is_first():
        print(f"{finished.path}: {did} step {finished.step}")
