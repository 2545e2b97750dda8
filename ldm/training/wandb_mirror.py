"""The only file that knows Weights & Biases: a mirror of the run directory that may fail without hurting the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from ldm.training.randomness import seed_of

log = logging.getLogger(__name__)


class WandbMirror(Logger):
    """Scalars and pictures to one W&B run, whose id belongs to the run directory: a resumed run goes on in it.

    mode: "offline" writes <run>/wandb/ for `wandb sync` later; "online" falls back to offline without a key.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        project: str = "ldm",
        mode: Literal["offline", "online"] = "offline",
        entity: str | None = None,
        images_per_step: int = 1,
    ):
        super().__init__()
        os.environ.setdefault("WANDB_SILENT", "true")
        self.images_per_step = images_per_step
        self.failed = False
        offline = mode == "offline" or not _has_key()
        if offline and mode == "online":
            log.warning("W&B has no API key here (`wandb login`): this run is logged offline, `wandb sync` sends it.")
        self.inner = WandbLogger(
            name=directory.name,
            save_dir=str(directory),
            project=project,
            entity=entity,
            offline=offline,
            id=f"{seed_of(str(directory.resolve())):016x}",
            resume=None if offline else "allow",
            config=config,
        )

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration went in when the run was made."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        images = (step or 0) * self.images_per_step
        self._try(lambda: self.inner.log_metrics({**metrics, "images": images}, step=step))

    def log_picture(self, key: str, image: Image.Image, step: int, caption: str = "") -> None:
        self._try(lambda: self.inner.log_image(key, [image], step=step, caption=[caption]))

    def finalize(self, status: str) -> None:
        self._try(lambda: self.inner.experiment.finish(exit_code=0 if status == "success" else 1))

    def _try(self, act: Callable[[], Any]) -> None:
        """W&B down, killed, or out of disk must not stop a training that metrics.jsonl already records."""
        if self.failed:
            return
        try:
            act()
        except Exception as error:
            self.failed = True
            log.warning("W&B stopped working (%s): the run goes on, metrics.jsonl and images/ have everything.", error)


def _has_key() -> bool:
    try:
        import wandb

        return bool(wandb.api.api_key)
    except Exception:
        return False
