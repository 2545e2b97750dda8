"""Pictures while it trains: reconstructions, the jump to x0, and samples with their prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from ldm.checkpoints.sampler import USUAL
from ldm.diffusion.grids import Spacing
from ldm.diffusion.samplers.solver import Solver
from ldm.errors import NotFinite
from ldm.pictures import film_strip, grid, to_unit
from ldm.sampling import Request, Sampler, chosen_steps
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainedModule, is_last_step, is_optimizer_step
from ldm.training.run.logging import log_picture

log = logging.getLogger(__name__)


class _Pictures(L.Callback):
    """Calls `draw` on the first process every n steps and after the last; without drawing from any training stream."""

    watches: type[TrainedModule]  # the module beside which it runs
    decides = False
    every_n_steps: int

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or not is_optimizer_step(trainer, batch_idx):
            return
        if step % self.every_n_steps == 0 or is_last_step(trainer):
            try:
                self.draw(trainer, pl_module, step)
            except NotFinite as error:  # the training goes on: its loss says whether it diverged
                log.warning("%s at step %d: no pictures, for %s", type(self).__name__, step, error)

    def draw(self, trainer: L.Trainer, module: Any, step: int) -> None:
        raise NotImplementedError(f"{type(self).__name__} must draw something.")


class Reconstructions(_Pictures):
    """Validation images above what the autoencoder makes of them (module=autoencoder)."""

    watches = AutoencoderTraining

    def __init__(self, every_n_steps: int = 500, num_images: int = 8):
        self.every_n_steps, self.num_images = every_n_steps, num_images

    def draw(self, trainer: L.Trainer, module: AutoencoderTraining, step: int) -> None:
        images = trainer.datamodule.first_validation(self.num_images)["image"]  # type: ignore[attr-defined]
        images = to_unit(images.to(module.device))
        with module.averaged():
            output = module.autoencoder.decode(module.autoencoder.encode(images).mode()).float()
        both = torch.cat([images, output])
        log_picture(trainer, "reconstructions", grid(both, columns=len(images)), step, "images above reconstructions")


class JumpToX0(_Pictures):
    """The film strip of sampling: at chosen steps the current latent decoded above its jump to x0.

    prompts: fixed texts; None takes the first captions of the validation data.
    decode_steps: steps that are decoded in full; every step is shown as a linear preview beside them.
    """

    watches = LatentDiffusion

    def __init__(
        self,
        every_n_steps: int = 500,
        prompts: Sequence[str] | None = None,
        num_prompts: int = 2,
        num_steps: int = 20,
        decode_steps: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20),
        guidance: float | None = None,  # None: the usual one
        seed: int = 0,
        sampler: Solver | None = None,
        grid: Spacing | None = None,
    ):
        self.every_n_steps, self.prompts, self.num_prompts = every_n_steps, prompts, num_prompts
        self.num_steps, self.decode_steps = num_steps, decode_steps
        self.guidance, self.seed, self.sampler, self.grid = guidance, seed, sampler, grid

    def draw(self, trainer: L.Trainer, module: LatentDiffusion, step: int) -> None:
        sampler, request = _drawing(self, trainer, module)
        prompts = list(request.prompts)
        with module.averaged():
            steps = list(sampler.steps(request))
            frames = sampler.frames(steps, chosen_steps(self.num_steps, self.decode_steps))
            log_picture(trainer, "jump_to_x0", film_strip(frames, prompts), step, "; ".join(prompts))
            if module.autoencoder.latents.has_preview:
                strip = film_strip(sampler.previews(steps), prompts, side=48)
                log_picture(trainer, "jump_to_x0_preview", strip, step, "linear previews of every step")


class Samples(_Pictures):
    """A grid of samples with their prompts, at fixed seeds; where adapters are trained, below what the base draws."""

    watches = LatentDiffusion

    def __init__(
        self,
        every_n_steps: int = 500,
        prompts: Sequence[str] | None = None,
        num_prompts: int = 16,
        num_steps: int = 20,
        guidance: float | None = None,  # None: the usual one
        seed: int = 0,
        sampler: Solver | None = None,
        grid: Spacing | None = None,
    ):
        self.every_n_steps, self.prompts, self.num_prompts = every_n_steps, prompts, num_prompts
        self.num_steps, self.guidance, self.seed, self.sampler, self.grid = num_steps, guidance, seed, sampler, grid
        self._base: torch.Tensor | None = None  # what the base draws: the same at every step

    def draw(self, trainer: L.Trainer, module: LatentDiffusion, step: int) -> None:
        sampler, request = _drawing(self, trainer, module)
        prompts = list(request.prompts)
        with module.averaged():
            images = sampler.sample(request)
            if module.adapters and self._base is None:
                with module.adapters_disabled():
                    self._base = sampler.sample(request)
        picture, text = grid(images, prompts), "; ".join(prompts)
        if self._base is not None:
            both = torch.cat([self._base, images])
            picture = grid(both, [*prompts, *prompts], columns=len(images))
            text = f"above the base, below with adapters: {text}"
        log_picture(trainer, "samples", picture, step, text)


def _drawing(callback: JumpToX0 | Samples, trainer: L.Trainer, module: LatentDiffusion) -> tuple[Sampler, Request]:
    """What both callbacks draw: fixed prompts, one fixed seed a picture, at the size of the training images."""
    prompts = list(callback.prompts or module.described(fixed_prompts(trainer, callback.num_prompts)))
    size = trainer.datamodule.image_size  # type: ignore[attr-defined]
    image, mask = None, None
    if module.masks is not None:  # held-out pictures, repainted where the first masks of the validation are
        image = to_unit(trainer.datamodule.first_validation(len(prompts))["image"])  # type: ignore[attr-defined]
        prompts = prompts[: len(image)]
        mask = module.masks(size, size, callback.seed, "pictures", 0, list(range(len(prompts))))
    request = Request(
        prompts,
        size,
        size,
        num_steps=callback.num_steps,
        guidance=USUAL["guidance"] if callback.guidance is None else callback.guidance,
        seeds=[callback.seed + i for i in range(len(prompts))],
        solver=callback.sampler or module.solver,
        spacing=callback.grid,
        init_image=image,
        mask=mask,
    )
    return Sampler(module.denoiser, module.autoencoder, module.text_encoder), request


def fixed_prompts(trainer: L.Trainer, n: int) -> list[str]:
    """The first captions of the validation data: the same in every run on these shards."""
    return list(trainer.datamodule.first_validation(n)["caption"])  # type: ignore[attr-defined]
