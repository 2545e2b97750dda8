"""The scores of task=evaluate while it trains, on averaged weights, with every process drawing its share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from ldm.checkpoints.components import Components
from ldm.checkpoints.sampler import sampling_settings
from ldm.errors import ConfigError, NotFinite
from ldm.evaluation.drawing import evaluation_of, image_shards
from ldm.evaluation.scoring import check_asked, check_count, scores
from ldm.metrics.evaluation import Group, Scored
from ldm.pipeline import Pipeline
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.distributed import collectives
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainedModule, is_due
from ldm.training.run.logging import log_metrics


class Scores(L.Callback):
    """Logs scores/HALF/METRIC every n steps and after the last: what task=evaluate says of the same weights and seed.

    metrics: as in conf/metric, by name. every_n_steps: 0 is never.
    num_images, num_steps, guidance, guidance_rescale, eta, sampler, grid, guider, seed: as task=evaluate reads them.
    """

    decides = False  # what is trained is the same without it

    def __init__(
        self,
        metrics: Mapping[str, Any] | None = None,
        every_n_steps: int = 0,
        num_images: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float | None = None,
        eta: float | None = None,
        sampler: Any = None,
        grid: Any = None,
        guider: Any = None,
        seed: int = 0,
    ):
        self.every_n_steps = every_n_steps
        given = metrics if isinstance(metrics, Mapping) else {"": metrics}
        self.metrics: dict[str, Scored] = {f"metric.{k}".rstrip("."): m for k, m in given.items() if m}
        if every_n_steps and not self.metrics:
            raise ConfigError("callbacks.scores has nothing to measure: choose metric=default or others.")
        for name, metric in self.metrics.items() if every_n_steps else ():
            check_asked(name, metric)
        asked = {"num_steps": num_steps, "guidance": guidance, "guidance_rescale": guidance_rescale, "eta": eta}
        asked |= {"sampler": sampler, "grid": grid, "guider": guider, "eval_images": num_images}
        self.asked = {**sampling_settings(asked, {}), "seed": seed, "weights": "ema"}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.every_n_steps and isinstance(pl_module, LatentDiffusion):
            check_count(self.metrics, self.asked["eval_images"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.every_n_steps or not is_due(trainer, batch_idx, self.every_n_steps):
            return
        assert isinstance(pl_module, TrainedModule)
        found, failed = {}, 0
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = image_shards(data.shards, data.fields, data.validation_fraction)
        group = Group(collectives.rank(), collectives.size(), collectives.every)
        with pl_module.averaged():
            try:
                pipe = self._pipe(trainer, pl_module)
                autoencoder: Any = pl_module.autoencoder
                own = getattr(pl_module, "solver", None)  # of the checkpoint that was adopted
                asked = {**self.asked, "sampler": self.asked["sampler"] or own}
                evaluation = evaluation_of(autoencoder, pipe, images, data.image_size, asked, None, group)
            except NotFinite as error:  # the training goes on: its loss says whether it diverged
                failed = 1
                print(f"scores at step {trainer.global_step}: {error}", flush=True)
            if not collectives.highest(failed):  # or the others would wait for this one's share
                found = scores(self.metrics, evaluation)
        named = {f"scores/{k}": v for k, v in found.items()}
        log_metrics(trainer, named, trainer.global_step)
        pl_module.log_dict(named, logger=False, on_step=True, on_epoch=False)  # for keep_best=, EarlyStopping

    def _pipe(self, trainer: L.Trainer, module: Any) -> Pipeline | None:
        if isinstance(module, AutoencoderTraining):
            return None
        folder = Path(trainer.default_root_dir)
        return Pipeline(Components(module.autoencoder, module.denoiser, module.text_encoder, folder=folder))

    def logged(self, module: TrainedModule, max_steps: int) -> list[str]:
        """Names of what a run of `max_steps` logs."""
        every = self.metrics.values() if self.every_n_steps else ()
        return [f"scores/{name}" for metric in every for name in getattr(metric, "scores", ())]
