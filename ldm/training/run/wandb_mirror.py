"""All that writes to Weights & Biases: a mirror of the run directory that may fail without hurting the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from ldm.config.check import module_kind
from ldm.config.root import digest
from ldm.training.run.directory import read_json
from ldm.training.run.logging import StepLogger, last_metrics
from ldm.untrusted import read_yaml

log = logging.getLogger(__name__)


class WandbMirror(StepLogger):
    """Scalars and pictures to one W&B run, which belongs to the run directory: a resumed run goes on in it.

    Its id is the run's digest and a nonce that run.json keeps, so that no two runs anywhere share one. What is None
    is for W&B's environment variables to say (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_RUN_GROUP, WANDB_TAGS,
    WANDB_NOTES; also WANDB_NAME and WANDB_JOB_TYPE).

    mode: "offline" writes <run>/wandb/ for `wandb sync` later; "online" falls back to offline without a key, and where
    WANDB_MODE says so. group: by default `name=`, or the command: its stages, and the arms of a sweep, are together.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        project: str | None = None,
        mode: Literal["offline", "online"] | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        images_per_step: int = 1,
    ):
        super().__init__()
        os.environ.setdefault("WANDB_SILENT", "true")
        self.images_per_step = images_per_step
        self.failed = False
        about = read_json(directory / "run.json")
        facts = {k: about.get(k) for k in ("digest", "git_commit", "versions", "command", "host", "hardware")}
        facts["global_batch"] = images_per_step
        facts["world_size"] = images_per_step // (config["batch_size"] * config["accumulate"])
        mode = _mode(mode)
        self.inner = WandbLogger(
            name=os.environ.get("WANDB_NAME") or directory.name,
            save_dir=str(directory),
            project=project or os.environ.get("WANDB_PROJECT") or "ldm",
            entity=entity or os.environ.get("WANDB_ENTITY"),
            id=f"{about.get('digest')}-{about.get('nonce')}",
            config={**config, "run": facts},
            mode=mode,
            resume="allow" if mode == "online" else None,
            group=group or os.environ.get("WANDB_RUN_GROUP") or _group(config, about),
            job_type=os.environ.get("WANDB_JOB_TYPE") or module_kind(config).removeprefix("latent_"),
            tags=tags or [t for t in os.environ.get("WANDB_TAGS", "").split(",") if t] or None,
            notes=notes or os.environ.get("WANDB_NOTES"),
        )
        self._try(lambda: self.inner.experiment.define_metric("images"))

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration went in when the run was made."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        done = self.steps_made(metrics, step)
        self._try(lambda: self.inner.log_metrics({**metrics, "images": done * self.images_per_step}, step=done))

    def log_picture(self, key: str, image: Image.Image, step: int, caption: str = "") -> None:
        self._try(lambda: self.inner.log_image(key, [image], step=step, caption=[caption]))

    def summarise(self, scores: Mapping[str, Any]) -> None:
        """Numbers of the run as a whole."""
        self._try(lambda: self.inner.experiment.summary.update(dict(scores)))

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


def add_scores(directory: Path, scores: Mapping[str, Any]) -> None:
    """Scores of task=evaluate to the summary of a finished run's W&B run, where it has one.

    The last value of every scalar goes along: `wandb sync` of a second folder of one run replaces its summary.
    """
    if not (directory / "wandb").is_dir() or not (directory / "config.yaml").is_file():
        return
    config = read_yaml(directory / "config.yaml")
    node = config.get("logger") or {}
    if node.get("_target_") != f"{__name__}.{WandbMirror.__name__}":
        return
    keys = ("project", "mode", "entity", "group", "tags", "notes")
    batch = read_json(directory / "run.json").get("identity", {}).get("global_batch", 1)
    mirror = WandbMirror(directory, config, images_per_step=batch, **{k: node.get(k) for k in keys})
    mirror.summarise({**last_metrics(directory / "metrics.jsonl"), **scores})
    mirror.finalize("success")


def _group(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    return config["name"] or f"{config['experiment']}-{digest(about.get('command'), 6)}"


def _mode(given: str | None) -> Any:
    said = {"dryrun": "offline", "run": "online"}.get(os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE"))
    mode = said if said in ("offline", "disabled") else given or said or "offline"
    if mode == "online" and not _has_key():
        log.warning("W&B has no API key here (`wandb login`): this run is logged offline, `wandb sync` sends it.")
        return "offline"
    return mode


def _has_key() -> bool:
    try:
        import wandb

        return bool(wandb.api.api_key)
    except Exception:
        return False
