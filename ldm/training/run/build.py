"""From a configuration to the LightningModule around its components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from ldm.adapters.textual_inversion import TextualInversion
from ldm.build import as_literal, build
from ldm.checkpoints.components import Components, Config, build_components
from ldm.config.check import locate, module_kind
from ldm.config.root import reference
from ldm.errors import ConfigError
from ldm.training.module import TrainedModule
from ldm.training.randomness import Draws, seed_of
from ldm.training.run.captions import caption_templates
from ldm.training.run.class_images import ClassImages
from ldm.training.solvers import training_solver


def build_parts(config: Config, device: str = "cpu") -> Components:
    """Fresh components for a configuration's module: an autoencoder alone, or all that a diffusion model is made of."""
    return build_components(config, device=device, whole=module_kind(config) == "latent_diffusion")


def build_module(config: Config, parts: Components, class_images: ClassImages | None = None) -> TrainedModule:
    """The LightningModule of a configuration around its parts; class_images: to train on beside the others."""
    handed: dict[str, Any] = {"autoencoder": parts.autoencoder}
    if parts.denoiser is not None:
        handed |= {"denoiser": parts.denoiser, "text_encoder": parts.text_encoder, "adapters": parts.adapters}
        handed |= {"templates": caption_templates(config), "class_images": class_images}
        handed["solver"] = training_solver(config)
    node = {"_target_": config["module"]["_target_"]}
    module = build(node, "module", **built_arguments(config), **handed)
    module.draws = Draws(config["batch_size"], config["accumulate"], seed=module.draws.seed)
    return module


def built_arguments(config: Config) -> dict[str, Any]:
    """What the module's node says, built; an error names the key that it was said under, `optimizer` say."""
    said = config["module"]
    whole = OmegaConf.create({**as_literal({k: v for k, v in config.items() if k != "module"}), "module": said})
    values: Any = OmegaConf.to_container(whole.module, resolve=True)
    made = {}
    for key, value in values.items():
        path = reference(said[key]) or f"module.{key}"
        if key != "_target_":
            made[key] = build(value, path) if isinstance(value, Mapping) else value
    losses = made.get("losses") or {}
    locate(said["_target_"], "module").check_terms(losses)  # type: ignore[attr-defined]
    for name, term in losses.items():
        if getattr(term, "begins", 0) >= config["max_steps"]:
            raise ConfigError(
                f"module.losses.{name}.start={term.begins}: the run ends after max_steps={config['max_steps']}, so it "
                "would never begin. Set an earlier step, or a larger max_steps."
            )
    return made


def weight_seed(config: Config) -> int:
    """Seed of torch's global generator while fresh weights are drawn."""
    return seed_of(config["seed"], "weights")


def check_builds(config: Config) -> None:
    """ConfigError for parts and adapters that cannot be built or do not fit, found out without memory or files."""
    parts = build_parts(config, "meta")
    for name, node in (config.get("adapter") or {}).items():
        adapter = build(node, f"adapter.{name}")
        if parts.denoiser is None or parts.text_encoder is None:
            raise ConfigError(f"adapter=[{name}] belongs to module=latent_diffusion: leave it out here.")
        if isinstance(adapter, TextualInversion):  # more can be said where the words are
            adapter.readable(parts.text_encoder)
        else:
            adapter.attach(parts.network, parts.text_encoder)
