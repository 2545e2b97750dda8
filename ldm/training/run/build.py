"""From a configuration to the LightningModule around its components."""

from __future__ import annotations

from ldm.build import build
from ldm.checkpoints.components import Components, Config
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import Recipe, TrainedModule
from ldm.training.prior import PriorImages
from ldm.training.randomness import Draws, seed_of
from ldm.training.run.captions import caption_templates
from ldm.training.solvers import training_solver


def build_module(config: Config, parts: Components, prior: PriorImages | None = None) -> TrainedModule:
    """The LightningModule of a configuration around its parts; `prior`: class pictures to train beside the others."""
    recipe = Recipe(
        build(config["optimizer"], "optimizer"),
        build(config["lr_scheduler"], "lr_scheduler"),
        build(config["ema"], "ema"),
    )
    draws = Draws(int(config["seed"]), config["batch_size"], config["accumulate"])
    if config["module"] == "autoencoder":
        return AutoencoderTraining(parts.autoencoder, recipe, draws, config["kl_weight"], config["reconstruction"])
    assert parts.denoiser is not None and parts.text_encoder is not None
    weighting = build(config["weighting"], "weighting")
    weighting.check(parts.denoiser.scheduler)
    return LatentDiffusion(
        parts.denoiser,
        parts.autoencoder,
        parts.text_encoder,
        weighting,
        build(config["times"], "times"),
        recipe,
        draws,
        config["caption_dropout"],
        config["noises_per_image"],
        build(config.get("masking"), "masking"),
        parts.adapters,
        caption_templates(config),
        prior,
        training_solver(config),
    )


def weight_seed(config: Config) -> int:
    """Seed of torch's global generator while fresh weights are drawn."""
    return seed_of(config["seed"], "weights")
