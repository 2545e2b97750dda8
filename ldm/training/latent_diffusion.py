"""Trains the second stage: denoising standardised latents under a caption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.autoencoders.kl import Autoencoder
from ldm.autoencoders.latents import Posterior
from ldm.devices import beside, on_device
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.loss import Prediction, predict
from ldm.diffusion.samplers.solver import Solver
from ldm.diffusion.times import Times, Uniform
from ldm.diffusion.weightings import Simple, Weighting
from ldm.errors import ConfigError
from ldm.pictures import curves, to_unit
from ldm.text.encoder import TextEncoder
from ldm.text.templates import Templates
from ldm.training.ema import EMA
from ldm.training.losses.denoising import Denoising
from ldm.training.losses.term import LossTerm, Step, check_layers, hidden_states
from ldm.training.masks import RandomMasks
from ldm.training.module import LearningRate, OptimizerMaker, TrainedModule
from ldm.training.randomness import stratified, uniform
from ldm.training.run.class_images import ClassImages
from ldm.training.totals import bin_times, binned

# Standardised latents have mean 0 and deviation 1 in every channel.
_STANDARD_NORMAL = Gaussian(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))


class LatentDiffusion(TrainedModule):
    """x_t = alpha x0 + sigma eps on latents; the network learns a x0 + b eps under the caption's condition.

    optimizer, lr_scheduler, ema, seed: as in `TrainedModule`.
    losses: terms by name; `train/loss_by_t` is the first one's. Usual: the denoising loss.
    """

    kind, term = "latent_diffusion", LossTerm
    parts: dict[str, str] = {"unet": "model", "vae": "autoencoder", "text_encoder": "text_encoder"}  # noqa: RUF012

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,  # frozen
        text_encoder: TextEncoder,  # trained where it says so itself
        optimizer: OptimizerMaker,
        losses: Mapping[str, LossTerm | None] | None = None,
        weighting: Weighting | None = None,  # of the squared error over noise levels; None: 1
        times: Times | None = None,  # which levels are trained on; None: all evenly, stratified
        lr_scheduler: LearningRate | None = None,
        ema: EMA | None = None,
        seed: int = 0,
        caption_dropout: float = 0.1,  # share of captions replaced by "", which guidance needs
        noises_per_image: int = 1,  # (t, eps) pairs for each encoded image
        masking: RandomMasks | None = None,  # for models that repaint: mask and masked latent beside x_t
        adapters: Mapping[str, Adapter] | None = None,  # attached; where there are some, they alone are trained
        templates: Templates | None = None,  # captions are drawn from them
        class_images: ClassImages | None = None,  # in every step beside the others, against forgetting
        solver: Solver | None = None,  # what its pictures are drawn with; None: the scheduler's own
    ):
        super().__init__(optimizer, lr_scheduler, ema, seed)
        assert isinstance(denoiser.model, nn.Module)
        self.denoiser = denoiser
        self.model = denoiser.model
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.text_encoder = text_encoder
        self.adapters = nn.ModuleDict(dict(adapters or {}))
        self.parts = {**self.parts, **{name: f"adapters.{name}" for name in self.adapters}}
        self.trains_text = text_encoder.trainable and not self.adapters
        self.text_has_gradient = self.trains_text or any(a.changes_text for a in (adapters or {}).values())
        if self.adapters:
            self.model.requires_grad_(False)
        if not self.trains_text:
            text_encoder.requires_grad_(False).eval()
        self.weighting, self.times = weighting or Simple(), times or Uniform(stratified=True)
        self.weighting.check(denoiser.scheduler)
        self.caption_dropout, self.noises_per_image, self.masks = caption_dropout, noises_per_image, masking
        self.templates, self.class_images, self.solver = templates, class_images, solver
        if masking is not None and class_images is not None:
            raise ConfigError(
                "masking=random needs the pictures at every step, and class pictures are kept as latents: leave out "
                "class_prompt= (experiment=inpaint), or masking=random."
            )
        terms = dict(losses or {"instance": Denoising()})
        if class_images is None:
            terms = {n: t for n, t in terms.items() if t is not None and not t.needs_class_images}
        self.take_losses(terms)
        check_layers(self.model, self.terms)
        watched = [f"train/{name}_loss" for name in self.losses] if len(self.losses) > 1 else []
        self.count(["train/loss", *watched, *binned("train/loss_by_t")])

    @property
    def trained_parts(self) -> list[str]:
        trained = list(self.adapters) or (["unet", "text_encoder"] if self.trains_text else ["unet"])
        return [*trained, *self.loss_parts]

    @property
    def terms(self) -> dict[str, LossTerm]:
        """The loss terms by name."""
        return cast(dict[str, LossTerm], dict(self.losses.items()))

    def own_options(self) -> dict[str, dict[str, Any]]:
        rates = {name: getattr(adapter, "lr", None) for name, adapter in self.adapters.items()}
        return {f"adapters.{name}.": {"lr": lr} for name, lr in rates.items() if lr is not None}

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Within the block the model is its base."""
        with ExitStack() as stack:
            for adapter in self.adapters.values():
                assert isinstance(adapter, Adapter)
                stack.enter_context(adapter.disabled())
            yield

    def train(self, mode: bool = True) -> LatentDiffusion:
        super().train(mode)
        self.autoencoder.eval()
        if not self.trains_text:
            self.text_encoder.eval()
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.autoencoder.latents.require_measured()
        for term in self.terms.values():
            term.start()

    def latents(self, batch: dict[str, Any], purpose: str, step: int, positions: Sequence[int]) -> Tensor:
        """x0 of a batch, (B,C,h,w): a sample of the posterior, standardised; from the cache where there is one."""
        with torch.no_grad():
            if "latent" in batch:
                posterior = self.autoencoder.posterior(batch["latent"])
            else:
                posterior = self.autoencoder.encode(to_unit(batch["image"]))
            return self._sampled(posterior, purpose, step, positions)

    def _sampled(self, posterior: Posterior, purpose: str, step: int, positions: Sequence[int]) -> Tensor:
        eps = self.draws.normal(posterior.mean.shape[1:], purpose, step, positions)
        return self.autoencoder.latents.standardise(posterior.sample(beside(eps, posterior.mean)))

    @torch.no_grad()
    def masked(self, batch: dict[str, Any], purpose: str, step: int, positions: Sequence[int]) -> Tensor | None:
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
        masks = beside(self.masks(height, width, self.draws.seed, purpose, step, positions), images)
        posterior = self.autoencoder.encode(images * (masks < 0.5))
        latent = self._sampled(posterior, f"{purpose}_posterior", step, positions)
        return torch.cat([F.interpolate(masks, size=latent.shape[-2:], mode="nearest"), latent], dim=1)

    def condition(self, captions: list[str]) -> Condition:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_has_gradient):
            return self.text_encoder.encode(captions)

    def described(self, captions: list[str]) -> list[str]:
        """What validation and the pictures on the way go by: the first template."""
        return captions if self.templates is None else self.templates.first(captions)

    def _captions(self, captions: list[str], prefix: str, step: int, positions: Sequence[int]) -> list[str]:
        """Some captions become the empty one."""
        dropped = uniform(self.draws.seed, f"{prefix}caption_dropout", step, positions) < self.caption_dropout
        return ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]

    def _noise(self, shape: torch.Size, prefix: str, step: int, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B,) draws of times in (0, 1) and (B,C,h,w) noise."""
        seed = self.draws.seed
        if self.times.stratified:
            total = self.draws.global_batch * self.noises_per_image
            t_draws = stratified(seed, f"{prefix}times", step, pairs, total)
        else:
            t_draws = uniform(seed, f"{prefix}times", step, pairs)
        return t_draws, self.draws.normal(shape, f"{prefix}noise", step, pairs)

    def predict(self, x0: Tensor, cond: Condition, t_draws: Tensor, eps: Tensor) -> Prediction:
        """One pass over noised latents, (N,C,h,w), at the levels that draws of times in (0, 1) name, (N,)."""
        level = self.times(t_draws, self.denoiser.scheduler)
        return predict(self.denoiser, x0, cond, level.to(x0.device), eps)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        seed, step, n, of_class = self.draws.seed, self.global_step, self.noises_per_image, self.class_images
        captions = batch["caption"]
        positions = self.draws.positions(batch_idx, len(captions))
        if self.templates is not None:
            captions = self.templates.drawn(captions, uniform(seed, "template", step, positions).tolist())
        captions = self._captions(captions, "", step, positions)
        x0 = self.latents(batch, "posterior", step, positions)
        pairs = range(positions.start * n, positions.stop * n)
        t_draws, eps = self._noise(x0.shape[1:], "", step, pairs)
        if of_class is not None:  # the same of the class pictures, behind them in one batch
            moments, class_captions = of_class.drawn(seed, step, positions)
            captions = captions + self._captions(class_captions, "prior_", step, positions)
            posterior = self.autoencoder.posterior(on_device(moments, x0.device))
            x0 = torch.cat([x0, self._sampled(posterior, "prior_posterior", step, positions)])
            class_t, class_eps = self._noise(x0.shape[1:], "prior_", step, pairs)
            t_draws, eps = torch.cat([t_draws, class_t]), torch.cat([eps, class_eps])
        cond = replace(self.condition(captions), concat=self.masked(batch, "mask", step, positions))
        x0 = x0.repeat_interleave(n, dim=0)
        layers = [layer for term in self.terms.values() for layer in term.layers]
        with hidden_states(self.model, layers) as hidden:
            prediction, of_class_too = self.predict(x0, cond.repeat_interleave(n), t_draws, beside(eps, x0)), None
        if of_class is not None:
            own, others = slice(0, len(pairs)), slice(len(pairs), None)
            hidden = {layer: states[own] for layer, states in hidden.items()}
            prediction, of_class_too = prediction.rows(own), prediction.rows(others)
        made = Step(batch, prediction, self.weighting, of_class_too, hidden)
        values = {name: term(made) for name, term in self.terms.items()}
        losses = self.weighed(values)
        t = prediction.level.t
        assert isinstance(t, Tensor)
        self.totals.add_by_bin("train/loss_by_t", next(iter(values.values())), t)
        if len(values) > 1:
            for name, value in values.items():
                self.totals.add(f"train/{name}_loss", value)
        self.totals.add("train/loss", losses)
        return losses.mean()

    def validation_names(self) -> list[str]:
        return ["val/loss", "val/gaussian_loss", *binned("val/loss_by_t"), *binned("val/x0_error_by_t")]

    def validation_values(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Every image at the same fixed (t, eps): differences between two validations are the model's alone.

        val/gaussian_loss is the smallest loss of whoever knows the latents' mean and variance only; what the model is
        below it, it has learnt about pictures.
        """
        captions = self.described(batch["caption"])
        # The loader deals whole batches to ranks in turn, so the index is the sample's own.
        positions = batch["index"]
        x0 = self.latents(batch, "validation_posterior", 0, positions)
        concat = self.masked(batch, "validation_mask", 0, positions)
        cond, values = replace(self.condition(captions), concat=concat), {}
        losses, gaussian_losses = [], []
        for i, time in enumerate(bin_times()):
            t = torch.full((len(x0),), time, dtype=torch.float64)
            level = self.denoiser.scheduler.level(self.denoiser.scheduler.snap(t)).to(x0.device)
            eps = beside(self.draws.normal(x0.shape[1:], f"validation_noise_{i}", 0, positions), x0)
            prediction = predict(self.denoiser, x0, cond, level, eps)
            losses.append(prediction.loss(self.weighting))
            alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
            slope = self.denoiser.parameterization.determinant(alpha, sigma) / sigma
            weight = prediction.weight(self.weighting)
            gaussian_losses.append(weight * slope**2 * _STANDARD_NORMAL.irreducible_loss(level))
            jump = (prediction.jump - x0).square().flatten(1).mean(1)
            values[f"val/loss_by_t/{i}"], values[f"val/x0_error_by_t/{i}"] = losses[-1], jump
        gaussian = torch.stack(gaussian_losses).mean(0)
        return {"val/loss": torch.stack(losses).mean(0), "val/gaussian_loss": gaussian, **values}

    def validation_pictures(self, values: dict[str, float]) -> dict[str, Image.Image]:
        """The error of the jump to x0 against sigma: late jumps are sharp, early ones an average."""
        scheduler = self.denoiser.scheduler
        levels = [scheduler.level(scheduler.snap(t)) for t in bin_times()]
        sigmas = [float(level.ratio) for level in levels]
        errors = [values[f"val/x0_error_by_t/{i}"] for i in range(len(levels))]
        gaussian = [float(_STANDARD_NORMAL.irreducible_loss(level)) for level in levels]
        lines = {"model": errors, "mean and variance known": gaussian}
        return {"x0_error": curves(sigmas, lines, "sigma / alpha", "squared error of the jump")}
