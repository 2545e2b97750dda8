"""Trains the first stage: images -> latents -> images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from ldm.autoencoders.kl import Autoencoder
from ldm.devices import beside
from ldm.errors import ConfigError
from ldm.pictures import to_unit
from ldm.training.distributed import collectives
from ldm.training.ema import EMA
from ldm.training.losses.perturbations import Perturbation, Place
from ldm.training.losses.reconstruction import Reconstruction
from ldm.training.losses.term import PictureTerm, Reconstructed
from ldm.training.module import LearningRate, OptimizerMaker, TrainedModule
from ldm.training.randomness import seed_of

DECODER = ("decoder.", "post_quant_conv.")  # beginnings of names in an autoencoder: what turns latents into pictures
LARGEST_FACTOR = 1e4  # of an adaptive weight (Esser et al. 2021's code)


class AutoencoderTraining(TrainedModule):
    """The terms of `losses` plus what the autoencoder says against wild latents, a small KL term or a codebook's terms
    (Rombach et al. 2022, Section 3.1 and Appendix G).

    losses: terms by name, on the pictures that come back and their latents.
    kl_weight: per nat of an image, beside the mean over its pixels and channels.
    train_parts: all, or the decoder alone: latents, and what was trained on them, stay as they are.
    perturbations: what happens to latents before they are decoded, by name, in this order.
    optimizer, lr_scheduler, ema, seed: as in `TrainedModule`.
    """

    kind, term = "autoencoder", PictureTerm
    parts = {"vae": "autoencoder"}  # noqa: RUF012 (a constant of the class)

    def __init__(
        self,
        autoencoder: Autoencoder,
        optimizer: OptimizerMaker,
        losses: Mapping[str, PictureTerm | None] | None = None,
        kl_weight: float = 1e-6,
        train_parts: Literal["all", "decoder"] = "all",
        perturbations: Mapping[str, Perturbation | None] | None = None,
        lr_scheduler: LearningRate | None = None,
        ema: EMA | None = None,
        seed: int = 0,
    ):
        super().__init__(optimizer, lr_scheduler, ema, seed)
        self.autoencoder = autoencoder
        terms = losses or {"reconstruction": Reconstruction()}
        self.check_terms(terms)
        for term in terms.values():
            if term is not None:
                term.bind(autoencoder)
        self.take_losses(terms)
        self.kl_weight, self.trains_encoder = kl_weight, train_parts == "all"
        self.perturbations = [a for a in (perturbations or {}).values() if a is not None]
        if not self.trains_encoder:
            self._hold_encoder()
        of_terms = [name for names in self.logged.values() for name in names]
        of_latents = autoencoder.regulariser_names if self.trains_encoder else ()
        self.count([f"train/{n}" for n in ("loss", *of_terms, *of_latents)])

    def _hold_encoder(self) -> None:
        """Leaves all but the decoder as it is."""
        for name, term in self.terms.items():
            if term.of_latents:
                raise ConfigError(
                    f"module.losses.{name} teaches the encoder, which module.train_parts=decoder leaves as it is: "
                    f"leave one of them out."
                )
        for name, parameter in self.autoencoder.named_parameters():
            parameter.requires_grad_(name.startswith(DECODER))

    @property
    def terms(self) -> dict[str, PictureTerm]:
        """The loss terms by name."""
        return cast(dict[str, PictureTerm], dict(self.losses.items()))

    @property
    def logged(self) -> dict[str, list[str]]:
        """What each term is logged as: itself first, then what is watched of it."""
        return {
            name: [name + term.note, *([f"{name}_weight"] if term.adaptive else []), *term.watched]
            for name, term in self.terms.items()
        }

    @property
    def trained_parts(self) -> list[str]:
        return ["vae", *self.loss_parts]

    @property
    def adversaries(self) -> dict[str, PictureTerm]:
        """Terms with a network that is trained against the autoencoder, by the beginning of their parameters' names."""
        return {f"losses.{name}.": term for name, term in self.terms.items() if term.adversary}

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        others = tuple(self.adversaries)
        return {k: p for k, p in self.trained_parameters().items() if not k.startswith(others)}

    def clipped_together(self) -> list[list[nn.Parameter]]:
        of_terms = [list(term.parameters()) for term in self.adversaries.values()]
        return [list(self.averaged_parameters().values()), *of_terms]

    def own_options(self) -> dict[str, dict[str, Any]]:
        return {start: term.options() for start, term in self.adversaries.items()}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for term in self.terms.values():
            term.start()
        if any(term.adaptive for term in self.terms.values()):
            functorch.donated_buffer = False  # of compiled networks gradients are asked twice

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = to_unit(batch["image"])
        with torch.set_grad_enabled(self.trains_encoder):
            posterior = self.autoencoder.encode(images)
        positions = self.draws.positions(batch_idx, len(images))
        eps = self.draws.normal(posterior.mean.shape[1:], "posterior", self.global_step, positions)
        z = posterior.sample(beside(eps, images))
        decoded, wanted = z, images
        for perturb in self.perturbations:
            decoded, wanted = perturb(decoded, wanted, Place(self.draws, self.global_step, positions))
        output = self.autoencoder.decode(decoded).float()
        made = Reconstructed(wanted, output, images, z, self.global_step)
        likelihood, values = self._likelihood(made)
        loss, adversaries = likelihood, torch.zeros_like(likelihood)
        of_latents: dict[str, Tensor] = {}
        if self.trains_encoder:
            self.autoencoder.begin_batch(positions, self.draws.global_batch)
            regulariser, of_latents = self.autoencoder.regulariser(posterior, self.kl_weight)
            loss = loss + regulariser
        for name, term in self.terms.items():
            if not term.likelihood:
                ours, theirs = self._beside(name, term, made, likelihood, values)
                loss, adversaries = loss + ours, adversaries + theirs
        for name, value in {"loss": loss, **values, **of_latents}.items():
            self.totals.add(f"train/{name}", value)
        return (loss + adversaries).mean()

    def _likelihood(self, made: Reconstructed) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) the error of the pictures, and (B,) values of its terms to log."""
        terms = {name: term for name, term in self.terms.items() if term.likelihood}
        values = {name: term(made) for name, term in terms.items()}
        total = self.weighed(values)
        for term in terms.values():
            if (s := getattr(term, "log_variance", None)) is not None:
                total = total / s.exp() + s
        return total, {name + terms[name].note: value for name, value in values.items()}

    def _beside(
        self, name: str, term: PictureTerm, made: Reconstructed, likelihood: Tensor, values: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What a term that is no error of the picture adds to the loss, and the loss of its own parameters: (B,) or ()
        each. Into `values` goes what is logged of it."""
        nothing = likelihood.new_zeros(())
        if made.step < term.begins:  # its parameters take part all the same: processes wait for all gradients
            return nothing, sum((0.0 * p.sum() for p in term.parameters()), nothing)
        value = term(made)
        values[name + term.note] = value
        weighed = term.weight * value
        if term.adaptive:
            factor = self._factor(likelihood, value, term.adaptive)
            values[f"{name}_weight"] = factor.expand(len(value))
            weighed = factor * weighed
        own = term.own(made)
        if own is None:
            return weighed, nothing
        values.update(own[1])
        return weighed, own[0]

    def _factor(self, likelihood: Tensor, value: Tensor, layer: str) -> Tensor:
        """() how much larger the likelihood's gradient is at a layer (Esser et al. 2021, Equation 7)."""
        weight = self.autoencoder.last_layer if layer == "decoder" else self.autoencoder.last_encoder_layer
        sizes = [torch.autograd.grad(v.mean(), weight, retain_graph=True)[0].norm() for v in (likelihood, value)]
        return (sizes[0] / (sizes[1] + 1e-6)).clamp(0, LARGEST_FACTOR)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for term in self.terms.values():
            if self.global_step < term.begins:  # without a gradient an optimizer leaves them alone, moments too
                for parameter in term.parameters():
                    parameter.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        seed = seed_of(self.draws.seed, "autoencoder")
        self.autoencoder.end_step(collectives.total_on_device, seed, self.global_step)
        for term in self.terms.values():
            term.end_step(collectives.total_on_device)

    def validation_names(self) -> list[str]:
        return ["val/loss", "val/psnr", *(f"val/{n}" for n in self.autoencoder.regulariser_names)]

    def validation_values(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """val/loss is the likelihood's terms and the regulariser: what means the same all through a run."""
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        z = posterior.mode()
        output = self.autoencoder.decode(z).float().clamp(-1, 1)
        regulariser, watched = self.autoencoder.regulariser(posterior, self.kl_weight)
        loss = self._likelihood(Reconstructed(images, output, images, z, self.global_step))[0] + regulariser
        return {"val/loss": loss, "val/psnr": psnr(output, images), **{f"val/{n}": v for n, v in watched.items()}}


def psnr(output: Tensor, images: Tensor) -> Tensor:  # (B,3,H,W) in [-1, 1] x2 -> (B,) decibels
    """Peak signal-to-noise ratio of each image; the peak-to-peak range is 2."""
    mse = (output - images).square().flatten(1).mean(dim=1).clamp_min(1e-10)
    return 10 * torch.log10(4 / mse)
