"""From a configuration to modules: fresh ones, and ones filled from a checkpoint folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.adapters.adapter import Adapter
from ldm.autoencoders.kl import Autoencoder
from ldm.build import build
from ldm.checkpoints.folder import State
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import ConfigError
from ldm.formats.content import PARTS
from ldm.formats.files import bounded
from ldm.models.inputs import inpainting_channels
from ldm.text.encoder import TextEncoder
from ldm.untrusted import whole

Config = Mapping[str, Any]


@dataclass
class Components:
    """A model in memory: its modules, the configuration that builds them, and where they come from.

    An autoencoder alone has neither denoiser nor text encoder.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser | None = None
    text_encoder: TextEncoder | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)  # attached; by their node's name or their path
    config: dict[str, Any] = field(default_factory=dict, repr=False)  # resolved
    folder: Path | None = None  # the checkpoint folder of a run of ours, else the path that was given; None: fresh
    scheduler_config: dict[str, Any] | None = None  # diffusers' scheduler_config.json, where there is one

    @property
    def network(self) -> nn.Module:
        """The denoising network of a whole model."""
        assert self.denoiser is not None and isinstance(self.denoiser.model, nn.Module)
        return self.denoiser.model

    def for_sampling(self) -> Components:
        """Nothing drops out, adapters included, and nothing has a gradient."""
        for module in (*self.modules().values(), *self.adapters.values()):
            module.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device) -> Components:
        """Moves all of it, adapters too."""
        for module in (*self.modules().values(), *self.adapters.values()):
            module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What checkpoints hold, by the name that it has there."""
        if self.denoiser is None or self.text_encoder is None:
            return {"vae": self.autoencoder}
        return {"vae": self.autoencoder, "unet": self.network, "text_encoder": self.text_encoder}


def task_device() -> str:
    """Where tasks that draw, encode or evaluate in one process compute: on the GPU where there is one.

    Apple's is left out: it has no float64, which the schedulers' levels are in.
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_components(
    config: Config, tokenizer: Path | None = None, device: str = "cpu", whole: bool = True
) -> Components:
    """Modules with fresh weights from a resolved configuration; combinations that cannot work are refused.

    whole: all of them, or the autoencoder alone, whatever else the configuration says (`is_whole`).
    device="meta" allocates nothing: what cannot be built is found out before anything is read or written.
    """
    with torch.device(device):
        # Convolutions take this layout as it is: 0.87 of the time of a step of the quickstart's U-Net on a CPU.
        autoencoder = build(config["autoencoder"], "autoencoder").to(memory_format=torch.channels_last)
    if not whole:
        return Components(autoencoder, config=dict(config))
    scheduler = build(config["scheduler"], "scheduler")
    parameterization = build(config["parameterization"], "parameterization")
    parameterization.check(scheduler)
    with torch.device(device):
        text_encoder = build(config["text_encoder"], "text_encoder")
    if tokenizer is not None:
        text_encoder.load_tokenizer(tokenizer)
    with torch.device(device):
        model = build(config["model"], "model").to(memory_format=torch.channels_last)
    _check_widths(config["model"], model, text_encoder, len(autoencoder.latents.mean))
    return Components(autoencoder, Denoiser(model, scheduler, parameterization), text_encoder, config=dict(config))


def _check_widths(node: Config, model: nn.Module, text_encoder: TextEncoder, latent_channels: int) -> None:
    """ConfigError where what a network states of itself (ldm/models/inputs.py) does not fit what it is put between."""
    wanted, given = getattr(model, "cross_attention_dim", text_encoder.context_dim), text_encoder.context_dim
    if wanted != given:
        raise ConfigError(
            f"model.cross_attention_dim={wanted}, but the text encoder's states are {given} wide: "
            f"{_set_to(node, model, 'cross_attention_dim', given)}choose another text_encoder=."
        )
    wanted, given = getattr(model, "pooled_dim", text_encoder.pooled_dim), text_encoder.pooled_dim
    if wanted not in (None, given) or (given is not None and text_encoder.context_dim is None and wanted != given):
        raise ConfigError(
            f"model.pooled_dim={wanted}, but the text encoder's pooled vectors are {given} wide (None: it gives none): "
            f"set model.pooled_dim={'null' if given is None else given} where the model has it (model=dit_quickstart "
            "and other transformers), or choose another text_encoder=."
        )
    inpainting = inpainting_channels(latent_channels)
    for key, fitting in (("in_channels", (latent_channels, inpainting)), ("out_channels", (latent_channels,))):
        stated = getattr(model, key, latent_channels)
        if stated not in fitting:
            raise ConfigError(
                f"model.{key}={stated}, but the autoencoder has {latent_channels} latent channels: "
                f"{_set_to(node, model, key, latent_channels)}choose another autoencoder=."
            )


def _set_to(node: Config, model: nn.Module, key: str, value: int | None) -> str:
    """The remedy of a key, '' where the network has no such argument."""
    if key not in inspect.signature(type(model)).parameters:
        return ""
    return f"set {'' if key in node else '+'}model.{key}={'null' if value is None else value}, or "


def load_state(module: nn.Module, state: State, part: str, source: Path) -> None:
    """Loads one part strictly; a mismatch is one line with the first names."""
    state = _widened(state, module)
    _check_fill(module, state, part, source)
    module.load_state_dict(state)


def _check_fill(module: nn.Module, state: State, part: str, source: Path) -> None:
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        k = (missing + unknown + shapes)[0]
        raise ConfigError(
            f"{source / part}.safetensors does not fit this configuration: {len(missing)} tensors missing, "
            f"{len(unknown)} unknown, {len(shapes)} of another shape (first: {k}). "
            "Give the checkpoint of a model of the same size, or the same model=, autoencoder= and text_encoder=."
        )


def is_whole(states: Mapping[str, State]) -> bool:
    """Whether tensors are of a whole model (one that lacks a part, too), or of an autoencoder alone."""
    return "unet" in states or "text_encoder" in states


def check_stored(config: Config, states: Mapping[str, State], source: Path) -> None:
    """ConfigError where a checkpoint's tensors do not fill what its configuration describes, before memory is taken."""
    where = f"{source}: its configuration"
    for key in PARTS.values():
        bounded.check_numbers(config.get(key), where)
    if config.get("image_size") is not None:
        whole(config["image_size"], "image_size", where, most=2**12)
    with bounded.building(where):
        modules = build_components(config, device="meta", whole=is_whole(states)).modules()
    missing = sorted(modules.keys() - states.keys())
    if missing:
        raise ConfigError(
            f"{source} describes {', '.join(missing)} and holds no tensors of it: fetch the whole of it again."
        )
    scale, mean = (states["vae"].get(f"latents.{name}") for name in ("scale", "mean"))  # NaN: not measured yet
    if scale is not None and mean is not None and bool((scale <= 0).any() or scale.isinf().any() or mean.isinf().any()):
        raise ConfigError(f"{source}: its latents' scale is not above 0, or not finite: it was edited. Fetch it again.")
    for part, module in modules.items():
        _check_fill(module, _widened(states[part], module), part, source)


def check_adapters(config: Config, saved: Config, source: Path | str | None) -> None:
    """ConfigError where a run would not go on with the adapters of the checkpoint that it starts from, as they are.

    saved: the checkpoint's configuration.
    """
    nodes, before = (c.get("adapter") or {} for c in (config, saved))
    forgotten = sorted(before.keys() - nodes.keys())
    if forgotten:
        raise ConfigError(
            f"checkpoint={source} was trained with an adapter, {', '.join(forgotten)}: add "
            f"adapter=[{','.join(sorted(before))}] to go on with it, or merge it into the model first, task=merge."
        )
    for name, node in nodes.items():
        other = {k: v for k, v in before.get(name, node).items() if k not in ("lr", "dropout", "format")}
        changed = [k for k, v in other.items() if node.get(k) != v]
        if changed:
            raise ConfigError(
                f"adapter.{name}.{changed[0]}={node.get(changed[0])}, but checkpoint={source} was trained with "
                f"{other[changed[0]]}: its tensors mean that. Give adapter.{name}.{changed[0]}={other[changed[0]]}, or "
                "start from the base."
            )


def attach_adapters(config: Config, parts: Components, states: Mapping[str, State], source: Path | None = None) -> None:
    """Builds the configured adapters onto parts that have their weights; filled from `states` where those hold them.

    Their fresh tensors depend on the base: what an embedding begins as, how long DoRA's rows are.
    """
    nodes = config.get("adapter") or {}
    if not nodes:
        return
    if parts.denoiser is None or parts.text_encoder is None or "unet" not in states:
        raise ConfigError(
            f"adapter=[{','.join(nodes)}] is trained beside a whole model that is there already: give checkpoint=PATH."
        )
    if _widened(states["unet"], parts.network) is not states["unet"]:
        raise ConfigError(
            "masking=random with an adapter: the checkpoint's network has no inputs for mask and masked picture, and "
            "an adapter cannot learn them. Start from a model that repaints, or train the whole one, without adapter=."
        )
    for name, node in nodes.items():
        adapter = build(node, f"adapter.{name}")
        if name in states:
            adapter.check_state(states[name], f"{source or name}: its adapter {name}")
        adapter.attach(parts.network, parts.text_encoder)
        if name in states:
            load_state(adapter, states[name], name, source or Path(name))
        parts.adapters[name] = adapter


def load_states(parts: Components, states: dict[str, State], folder: Path) -> None:
    """Fills those parts that a checkpoint has and this configuration has too.

    A network with more input channels than the checkpoint's gets zeros there: it starts as the model without them.
    """
    modules = parts.modules()
    for part, state in states.items():
        module = modules.get(part)
        if module is not None:
            load_state(module, state, part, folder)


def _widened(state: State, module: nn.Module) -> State:
    """A state for a network that may have more input channels, or a codebook that is learnt in another way; itself
    where there is nothing to widen."""
    own_way = getattr(module, "widened", None)
    return state if own_way is None else own_way(state)
