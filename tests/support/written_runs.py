"""Run directories written by hand, as a run writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ldm.analysis import Run
from ldm.training.run.directory import write_json
from ldm.training.run.logging import RunLogger

CONFIG: dict[str, Any] = {
    "seed": 0,
    "experiment": "law",
    "batch_size": 4,
    "data": {"seed": 0, "batch_size": 4, "crop": "centre"},
    "scheduler": {"_target_": "ldm.diffusion.schedulers.Flow"},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.99]},
}
MakeRun = Callable[..., Run]


def written_run(folder: Path, changes: dict[str, Any] | None = None, step: int = 3) -> Run:
    """A finished run: its configuration CONFIG changed by `changes`, its records through RunLogger."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **(changes or {})}))
    write_json(folder / "run.json", {"digest": folder.name})
    write_json(folder / "status.json", {"state": "finished", "step": step, "time": step})
    logger = RunLogger(folder, images_per_step=4)
    for s in range(1, step + 1):
        logger.log_metrics({"train/loss": 1 / s, f"train/loss_by_t/{s % 10}": 0.5}, s)
    errors = {f"val/x0_error_by_t/{i}": i / 10 for i in range(10)}
    logger.log_metrics({"val/loss": 0.1, **{f"val/loss_by_t/{i}": float(i) for i in range(10)}, **errors}, step)
    return Run(folder)
