"""Trains the second stage: denoising standardised latents under a caption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.autoencoders.kl import Autoencoder
from ldm.autoencoders.latents import Posterior
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.levels import right_pad
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.samplers.solver import Solver
from ldm.diffusion.times import Times
from ldm.diffusion.weightings import Weighting
from ldm.errors import ConfigError
from ldm.pictures import curves
from ldm.text.encoder import TextEncoder
from ldm.training.autoencoder import to_unit
from ldm.training.masks import RandomMasks
from ldm.training.module import Recipe, TrainedModule
from ldm.training.randomness import Draws, normal, stratified, uniform
from ldm.training.totals import Totals, binned

VALIDATION_TIMES = 10  # the fixed grid of t at which every validation image is denoised
# Standardised latents have mean 0 and deviation 1 in every channel.
_STANDARD_NORMAL = Gaussian(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))


class LatentDiffusion(TrainedModule):
    """x_t = alpha x0 + sigma eps on latents; the network learns a x0 + b eps under the caption's condition."""

    parts = {"unet": "model", "vae": "autoencoder", "text_encoder": "text_encoder"}  # noqa: RUF012

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,  # frozen
        text_encoder: TextEncoder,  # trained where it says so itself
        weighting: Weighting,
        times: Times,
        recipe: Recipe,
        draws: Draws,
        caption_dropout: float = 0.1,  # share of captions replaced by "", which guidance needs
        noises_per_image: int = 1,  # (t, eps) pairs for each encoded image
        masks: RandomMasks | None = None,  # for models that repaint: mask and masked latent beside x_t
        solver: Solver | None = None,  # what its pictures are drawn with; None: the scheduler's own
    ):
        super().__init__(recipe, draws)
        assert isinstance(denoiser.model, nn.Module)
        self.denoiser = denoiser
        self.model = denoiser.model
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.text_encoder = text_encoder
        if not text_encoder.trainable:
            text_encoder.requires_grad_(False).eval()
        self.weighting, self.times = weighting, times
        self.caption_dropout, self.noises_per_image, self.masks = caption_dropout, noises_per_image, masks
        self.solver = solver
        self.totals = Totals(["train/loss", *binned("train/loss_by_t")])

    @property
    def trained_parts(self) -> list[str]:
        return ["unet", "text_encoder"] if self.text_encoder.trainable else ["unet"]

    def train(self, mode: bool = True) -> LatentDiffusion:
        super().train(mode)
        self.autoencoder.eval()
        if not self.text_encoder.trainable:
            self.text_encoder.eval()
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.autoencoder.latents.standardise(torch.zeros(1, len(self.autoencoder.latents.mean), 1, 1).to(self.device))

    def latents(self, batch: dict[str, Any], purpose: str, step: int, positions: list[int]) -> Tensor:
        """x0 of a batch, (B,C,h,w): a sample of the posterior, standardised; from the cache where there is one."""
        with torch.no_grad():
            if "latent" in batch:
                posterior = self.autoencoder.posterior(batch["latent"])
            else:
                posterior = self.autoencoder.encode(to_unit(batch["image"]))
            return self._sampled(posterior, purpose, step, positions)

    def _sampled(self, posterior: Posterior, purpose: str, step: int, positions: list[int]) -> Tensor:
        eps = normal(posterior.mean.shape[1:], self.draws.seed, purpose, step, positions)
        return self.autoencoder.latents.standardise(posterior.sample(eps.to(posterior.mean)))

    @torch.no_grad()
    def masked(self, batch: dict[str, Any], purpose: str, step: int, positions: list[int]) -> Tensor | None:
        """(B,1+C,h,w) of masks and masked pictures' latents (Rombach et al. 2022, Section 4.5); None without masks."""
        if self.masks is None:
            return None
        if "image" not in batch:
            raise ConfigError(
                "masking=random needs the pictures, and these shards hold latents only: give shards= of images, and "
                "leave the stage encode out."
            )
        images = to_unit(batch["image"])
        height, width = images.shape[-2:]
        masks = self.masks(height, width, self.draws.seed, purpose, step, positions).to(images)
        posterior = self.autoencoder.encode(images * (masks < 0.5))
        latent = self._sampled(posterior, f"{purpose}_posterior", step, positions)
        return torch.cat([F.interpolate(masks, size=latent.shape[-2:], mode="nearest"), latent], dim=1)

    def condition(self, captions: list[str]) -> Condition:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder.trainable):
            return self.text_encoder.encode(captions)

    def loss(self, x0: Tensor, cond: Condition, t_draws: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) losses and (B,) times; draws nothing."""
        level = self.times(t_draws, self.denoiser.scheduler)
        losses = diffusion_loss(self.denoiser, self.weighting, x0, cond, level.to(x0.device), eps)
        assert isinstance(level.t, Tensor)
        return losses, level.t

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        seed, step, n = self.draws.seed, self.global_step, self.noises_per_image
        captions = batch["caption"]
        positions = self.draws.positions(batch_idx, len(captions))
        dropped = uniform(seed, "caption_dropout", step, positions) < self.caption_dropout
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        x0 = self.latents(batch, "posterior", step, positions).repeat_interleave(n, dim=0)
        cond = replace(self.condition(captions), concat=self.masked(batch, "mask", step, positions))
        cond = cond.repeat_interleave(n)
        pairs = [p * n + i for p in positions for i in range(n)]
        if self.times.stratified:
            t_draws = stratified(seed, "times", step, pairs, self.draws.global_batch * n)
        else:
            t_draws = uniform(seed, "times", step, pairs)
        eps = normal(x0.shape[1:], seed, "noise", step, pairs).to(x0)
        losses, t = self.loss(x0, cond, t_draws, eps)
        self.totals.add("train/loss", losses)
        self.totals.add_by_bin("train/loss_by_t", losses, t)
        return losses.mean()

    def validation_names(self) -> list[str]:
        return ["val/loss", "val/gaussian_loss", *binned("val/loss_by_t"), *binned("val/x0_error_by_t")]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Every image at the same fixed (t, eps): differences between two validations are the model's alone.

        val/gaussian_loss is the smallest loss of whoever knows the latents' mean and variance only; what the model is
        below it, it has learnt about pictures.
        """
        captions, seed = batch["caption"], self.draws.seed
        # The loader deals whole batches to ranks in turn, so the index is the sample's own.
        positions = batch["index"].tolist()
        x0 = self.latents(batch, "validation_posterior", 0, positions)
        concat = self.masked(batch, "validation_mask", 0, positions)
        cond, values = replace(self.condition(captions), concat=concat), {}
        losses, gaussian_losses = [], []
        for i in range(VALIDATION_TIMES):
            t = torch.full((len(x0),), (i + 0.5) / VALIDATION_TIMES, dtype=torch.float64)
            level = self.denoiser.scheduler.level(self.denoiser.scheduler.snap(t)).to(x0.device)
            eps = normal(x0.shape[1:], seed, f"validation_noise_{i}", 0, positions).to(x0)
            x_t = right_pad(level.alpha, x0) * x0 + right_pad(level.sigma, x0) * eps
            output = self.denoiser.output(x_t, level, cond)
            error = (output - self.denoiser.parameterization.target(x0, eps, level)).square().flatten(1).mean(1)
            alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
            weight = self.weighting(alpha, sigma, self.denoiser.parameterization)
            losses.append(weight.to(error.dtype) * error)
            slope = self.denoiser.parameterization.determinant(alpha, sigma) / sigma
            gaussian_losses.append(weight * slope**2 * _STANDARD_NORMAL.irreducible_loss(level))
            jump = (self.denoiser.x0(x_t, output, level) - x0).square().flatten(1).mean(1)
            values[f"val/loss_by_t/{i}"], values[f"val/x0_error_by_t/{i}"] = losses[-1], jump
        gaussian = torch.stack(gaussian_losses).mean(0)
        return {"val/loss": torch.stack(losses).mean(0), "val/gaussian_loss": gaussian, **values}

    def validation_pictures(self, values: dict[str, float]) -> dict[str, Image.Image]:
        """The error of the jump to x0 against sigma: late jumps are sharp, early ones an average."""
        scheduler = self.denoiser.scheduler
        times = [scheduler.snap((i + 0.5) / VALIDATION_TIMES) for i in range(VALIDATION_TIMES)]
        levels = [scheduler.level(t) for t in times]
        sigmas = [float(level.ratio) for level in levels]
        errors = [values[f"val/x0_error_by_t/{i}"] for i in range(VALIDATION_TIMES)]
        gaussian = [float(_STANDARD_NORMAL.irreducible_loss(level)) for level in levels]
        lines = {"model": errors, "mean and variance known": gaussian}
        return {"x0_error": curves(sigmas, lines, "sigma / alpha", "squared error of the jump")}
