"""Pictures while it trains: reconstructions, the jump to x0, and samples with their prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch

from ldm.checkpoints.sampler import USUAL
from ldm.diffusion.grids import Spacing
from ldm.diffusion.samplers.solver import Solver
from ldm.errors import NotFinite
from ldm.pictures import Frame, film_strip, grid, reconstruction_rows, reconstruction_sheet, to_bytes, to_unit
from ldm.sampling import Request, Sampler, chosen_steps
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.distributed import collectives
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainedModule, is_due
from ldm.training.run.logging import log_picture

log = logging.getLogger(__name__)


class _Pictures(L.Callback):
    """Makes pictures every n steps and after the last, without drawing from any training stream.

    Every process makes a share of them, under the run's autocast; the first one's loggers get them all.
    """

    watches: type[TrainedModule]  # the module beside which it runs
    decides = False
    every_n_steps: int

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, made, failed = trainer.global_step, [], 0
        if not is_due(trainer, batch_idx, self.every_n_steps):
            return
        assert isinstance(pl_module, TrainedModule)
        count, make = self.prepared(trainer, pl_module)
        share = _share(count)
        try:
            with pl_module.averaged(), trainer.precision_plugin.val_step_context():
                made = [_bytes(rows) for rows in make([min(i, count - 1) for i in share])]
        except NotFinite as error:  # the training goes on: its loss says whether it diverged
            log.warning("%s at step %d: no pictures, for %s", type(self).__name__, step, error)
            failed = 1
        if not collectives.highest(failed):  # or the others would wait for this one's share
            self.show(trainer, [_unit(collectives.joined(rows, share.start, count)) for rows in made], step)

    def prepared(self, trainer: L.Trainer, module: Any) -> tuple[int, Callable[[list[int]], list[torch.Tensor]]]:
        """How many there are, and what makes those of some numbers: (row for each, ..., 3, H, W) in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must make something.")

    def show(self, trainer: L.Trainer, made: list[torch.Tensor], step: int) -> None:
        """Logs what was made: the rows of all processes, on the host. Called in each; `log_picture` writes in one."""
        raise NotImplementedError(f"{type(self).__name__} must show what it made.")


def _share(count: int) -> range:
    """The pictures that this process makes, equally many in each: some of the last ones' are beyond `count`."""
    size = -(-count // collectives.size())
    return range(collectives.rank() * size, (collectives.rank() + 1) * size)


def _bytes(images: torch.Tensor) -> torch.Tensor:  # (..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8 on the host
    shown = torch.from_numpy(to_bytes(images.flatten(0, -4)))
    return shown.view(*images.shape[:-3], *shown.shape[1:])


def _unit(shown: torch.Tensor) -> torch.Tensor:
    return to_unit(shown.movedim(-1, -3))


class Reconstructions(_Pictures):
    """Validation images, what the autoencoder makes of them, the difference, and the latents (module=autoencoder)."""

    watches = AutoencoderTraining

    def __init__(self, every_n_steps: int = 500, num_images: int = 8):
        self.every_n_steps, self.num_images = every_n_steps, num_images

    def prepared(self, trainer: L.Trainer, module: AutoencoderTraining) -> Any:
        images = to_unit(trainer.datamodule.first_validation(self.num_images)["image"])  # type: ignore[attr-defined]

        def make(rows: list[int]) -> list[torch.Tensor]:
            mine = images[rows].to(module.device)
            z = module.autoencoder.encode(mine).mode()
            return [reconstruction_rows(mine, module.autoencoder.decode(z), z)]

        return len(images), make

    def show(self, trainer: L.Trainer, made: list[torch.Tensor], step: int) -> None:
        text = "images above reconstructions, their difference x4 and the latents' channels"
        log_picture(trainer, "reconstructions", reconstruction_sheet(made[0]), step, text)


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

    def prepared(self, trainer: L.Trainer, module: LatentDiffusion) -> Any:
        sampler, request = _drawing(self, trainer, module)
        self._prompts = list(request.prompts)

        def make(rows: list[int]) -> list[torch.Tensor]:
            steps = list(sampler.steps(request.rows(rows)))
            strips = [sampler.frames(steps, chosen_steps(self.num_steps, self.decode_steps))]
            if module.autoencoder.latents.has_preview:
                strips.append(sampler.previews(steps))
            self._columns = [[(f.number, f.sigma) for f in frames] for frames in strips]
            return [torch.stack([torch.stack([f.current, f.jump], 1) for f in frames], 1) for frames in strips]

        return len(self._prompts), make

    def show(self, trainer: L.Trainer, made: list[torch.Tensor], step: int) -> None:  # (B, steps, 2, 3, H, W)
        said = ["; ".join(self._prompts), "linear previews of every step"]
        for key, side, text, columns, images in zip(
            ("jump_to_x0", "jump_to_x0_preview"), (64, 48), said, self._columns, made, strict=False
        ):
            frames = [Frame(*column, *images[:, i].unbind(1)) for i, column in enumerate(columns)]
            log_picture(trainer, key, film_strip(frames, self._prompts, side=side), step, text)


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

    def prepared(self, trainer: L.Trainer, module: LatentDiffusion) -> Any:
        sampler, request = _drawing(self, trainer, module)
        self._prompts = list(request.prompts)

        def make(rows: list[int]) -> list[torch.Tensor]:
            mine = request.rows(rows)
            images = [sampler.sample(mine)]
            if module.adapters and self._base is None:
                with module.adapters_disabled():
                    images.append(sampler.sample(mine))
            return images

        return len(self._prompts), make

    def show(self, trainer: L.Trainer, made: list[torch.Tensor], step: int) -> None:
        images, prompts, text = made[0], self._prompts, "; ".join(self._prompts)
        self._base = made[1] if len(made) > 1 else self._base
        if self._base is None:
            log_picture(trainer, "samples", grid(images, prompts), step, text)
            return
        picture = grid(torch.cat([self._base, images]), [*prompts, *prompts], columns=len(images))
        log_picture(trainer, "samples", picture, step, f"above the base, below with adapters: {text}")


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
