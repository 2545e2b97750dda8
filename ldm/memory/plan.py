"""What training takes in memory, by what takes it: from parameters counted and a step run on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.components import attach_adapters
from ldm.config.check import module_kind
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.memory.meta_step import GPUKernels, LiveBytes, backward
from ldm.models.block import blocks_of
from ldm.sampling import DECODED_AT_ONCE
from ldm.text.encoder import CLIPTokenized
from ldm.text.tokenizer import build_tokenizer
from ldm.training import adamw8bit, muon
from ldm.training.distributed.strategy import check_shares, check_strategy, gathered_in
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.run.build import build_module, build_parts
from ldm.training.run.frozen import DTYPES, cast_frozen, check_frozen_dtype

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Part:
    """Weights and buffers of a part of the model."""

    name: str
    parameters: int
    trained: int
    bytes: int


@dataclass
class Plan:
    """Bytes on one process' GPU. The phases of a step follow each other: the largest of them counts.

    Gradients are part of the phases that they live in. With trainer=fsdp all that is trained is a process's share.
    """

    parts: list[Part]
    gradients: int
    optimizer: int
    average: int
    phases: dict[str, int]

    @property
    def total(self) -> int:
        held = sum(p.bytes for p in self.parts) + self.optimizer + self.average
        return held + max(self.phases.values(), default=0)


def plan(config: Mapping[str, Any]) -> Plan:
    """The plan of a resolved configuration of module=latent_diffusion, on one GPU; ConfigError for what cannot be.

    Left out: CUDA's context, workspaces of its kernels, gaps between tensors, and what an optimizer's step makes and
    drops again (Muon stacks matrices of one shape).
    """
    half = _checked(config)
    parts = build_parts(config, "meta")
    adapted = bool(config.get("adapter"))
    cast_frozen(parts, adapted, DTYPES[config["frozen_dtype"]])
    words = parts.text_encoder
    if isinstance(words, CLIPTokenized) and not words.has_tokenizer:  # which words it knows changes no size
        words.set_tokenizer(build_tokenizer(["a photo"], words.vocab_size))
    attach_adapters(config, parts, {"unet": dict(parts.network.state_dict())})
    module = build_module(config, parts)
    assert isinstance(module, LatentDiffusion)
    trained, shares = module.trained_parameters(), _shares(config)
    held = sum(p.nbytes for p in trained.values()) // shares
    found = [_part(name, module.get_submodule(attribute)) for name, attribute in module.parts.items()]
    for part in found if shares > 1 else []:
        part.bytes = part.bytes // shares if part.name in module.trained_parts else part.bytes
    return Plan(
        found,
        gradients=held,
        optimizer=optimizer_bytes(config["optimizer"], trained) // shares,
        average=held * len(config["ema"].get("lengths", [0])) if config["ema"] else 0,
        phases=_phases(config, module, half, shares),
    )


def _shares(config: Mapping[str, Any]) -> int:
    """Among how many processes what is trained is cut."""
    if check_strategy(config["trainer"]) != "Sharded":
        return 1
    check_shares(config)
    return int(config["processes"])


def _checked(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type that autocast uses; ConfigError for configurations that no plan can be made of."""
    check_frozen_dtype(config)
    precision = str(config["trainer"].get("precision", "32-true"))
    if module_kind(config) != "latent_diffusion":
        raise ConfigError("task=plan is for module=latent_diffusion, not for module=autoencoder: leave it out.")
    if precision not in AUTOCAST:
        raise ConfigError(f"task=plan does not know trainer.precision={precision}: choose {', '.join(AUTOCAST)}.")
    if config["image_size"] is None:
        raise ConfigError("task=plan reads no data, so it needs the size of the pictures: give image_size=512.")
    return AUTOCAST[precision]


def _part(name: str, module: nn.Module) -> Part:
    parameters = list(module.parameters())
    tensors = [*parameters, *module.buffers()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Part(name, sum(p.numel() for p in parameters), trained, sum(t.nbytes for t in tensors))


def optimizer_bytes(node: Mapping[str, Any], trained: Mapping[str, nn.Parameter]) -> int:
    """What an optimizer keeps from step to step; ConfigError for one that is not known."""
    target, named = str(node["_target_"]), list(trained.items())
    if target == "ldm.training.adamw8bit.adamw8bit":
        return adamw8bit.state_bytes(named)
    if target == "ldm.training.muon.Muon":
        return muon.state_bytes(named, node.get("adamw", ()))
    if target in ("torch.optim.AdamW", "torch.optim.Adam"):
        return 2 * sum(p.nbytes for p in trained.values())
    raise ConfigError(f"task=plan does not know what {target} keeps: choose optimizer=adamw, adamw8bit or muon.")


def _phases(
    config: Mapping[str, Any], module: LatentDiffusion, half: torch.dtype | None, shares: int
) -> dict[str, int]:
    """The most that lives during each phase beside weights, gradients, optimizer and average."""
    size, batch = config["image_size"], config["batch_size"]
    factor, phases = module.autoencoder.factor, {}
    if size % factor:
        raise ConfigError(
            f"image_size={size} does not divide by the autoencoder's factor {factor}: give {size // factor * factor} "
            f"or {(size // factor + 1) * factor}."
        )
    cached = (config["stages"] or {}).get("encode", False) is not False
    if not cached or module.masks is not None:
        images = torch.empty(batch, 3, size, size, device="meta")
        phases["pictures to latents"] = _peak(lambda: module.autoencoder.encode(images), half) + images.nbytes
    gradients, travels = sum(p.nbytes for p in module.trained_parameters().values()) // shares, ""
    if shares > 1:
        travels = gathered_in(str(config["trainer"]["precision"]), config["trainer"]["strategy"].get("gather_dtype"))
        module.model.to(DTYPES[travels])  # what travels so is not cast, and no cast is kept
    forward, both = _step(module, batch, size, config["noises_per_image"], half)
    if shares > 1:
        both = forward + gradients + gathered(module.model, travels)
    elif config["accumulate"] > 1:  # the gradients of the micro-batches before are there
        phases = {name: peak + gradients for name, peak in phases.items()}
        both = max(both, forward + gradients)
    phases["loss and its gradients"] = both
    drawn = min(-(-_pictures(config["callbacks"] or {}) // config["processes"]), max(1, DECODED_AT_ONCE // size**2))
    if drawn:
        z = torch.empty(_latents(module, drawn, size), device="meta")
        phases[f"{drawn} pictures decoded"] = _peak(lambda: module.autoencoder.decode(z), half)
    return phases


def gathered(network: nn.Module, dtype: str) -> int:
    """The most that stands together beside the shares: a network's weights outside of its blocks, and of the largest
    block its weights, the next one's and the buffer that they come in, its gradients and the buffer that they go in."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(network)]
    outside, largest = sum(p.numel() for p in network.parameters()) - sum(blocks), max(blocks, default=0)
    return (outside + 3 * largest) * DTYPES[dtype].itemsize + 2 * largest * torch.float32.itemsize


def _pictures(callbacks: Mapping[str, Any]) -> int:
    """Most pictures that are drawn at once while it trains."""
    nodes = [callbacks.get(name) or {} for name in ("samples", "jump_to_x0")]
    return max(len(node.get("prompts") or ()) or node.get("num_prompts", 0) for node in nodes)


def _latents(module: LatentDiffusion, batch: int, size: int) -> tuple[int, int, int, int]:
    side = size // module.autoencoder.factor
    return batch, len(module.autoencoder.latents.mean), side, side


def _peak(function: Callable[[], Any], half: torch.dtype | None) -> int:
    """The most bytes that a computation without gradients has made and not yet dropped."""
    live = LiveBytes()
    with torch.no_grad(), live, GPUKernels(half):
        function()
    return live.peak


def _step(module: LatentDiffusion, batch: int, size: int, noises: int, half: torch.dtype | None) -> tuple[int, int]:
    """The peaks of the forward pass, and of forward and backward pass together; the new gradients are in the latter."""
    module.train()
    live, kernels = LiveBytes(), GPUKernels(half)
    with live, kernels:
        x0 = torch.empty(_latents(module, batch, size), device="meta").repeat_interleave(noises, dim=0)
        concat = None
        if module.masks is not None:
            masks = torch.empty(batch, 1, *x0.shape[-2:], device="meta").repeat_interleave(noises, dim=0)
            concat = torch.cat([masks, torch.empty_like(x0)], dim=1)
        with torch.set_grad_enabled(module.text_has_gradient):
            ids = torch.zeros(batch, module.text_encoder.max_length, dtype=torch.long, device="meta")
            cond: Condition = module.text_encoder.states(ids).repeat_interleave(noises)
        prediction = module.predict(x0, replace(cond, concat=concat), torch.full((len(x0),), 0.5), torch.empty_like(x0))
        loss = prediction.loss(module.weighting).mean()
    forward = live.peak
    kernels.forward_is_over()
    live.peak = live.now
    with live, kernels:
        backward(loss)
    return forward, max(forward, live.peak)
