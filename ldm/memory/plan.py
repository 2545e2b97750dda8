"""What training takes in memory, by what takes it: from parameters counted and a step run on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm.config.check import module_kind
from ldm.errors import ConfigError
from ldm.memory.meta_step import GPUKernels, LiveBytes, backward
from ldm.memory.simulated import Simulated
from ldm.models.block import blocks_of
from ldm.sampling import DECODED_AT_ONCE
from ldm.training import adamw8bit, muon
from ldm.training.distributed.strategy import check_shares, check_strategy, gathered_in
from ldm.training.run.frozen import DTYPES

DECODED = "pictures decoded"  # the end of that phase's name


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
    shares: int = 1  # among how many processes what is trained is cut

    @property
    def held(self) -> int:
        """What stands through all phases."""
        return sum(p.bytes for p in self.parts) + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.held + max(self.phases.values(), default=0)

    @property
    def of_step(self) -> int:
        """The same without pictures that are drawn on the way."""
        return self.held + max(size for name, size in self.phases.items() if not name.endswith(DECODED))


def plan(config: Mapping[str, Any]) -> Plan:
    """The plan of a resolved configuration, on one GPU; ConfigError for what cannot be.

    Left out: CUDA's context, workspaces of its kernels, gaps between tensors, and what an optimizer's step makes and
    drops again (Muon stacks matrices of one shape).
    """
    simulated = Simulated(config)
    module = simulated.module
    trained, shares = module.trained_parameters(), _shares(config)
    held = sum(p.nbytes for p in trained.values()) // shares
    averaged = sum(p.nbytes for p in module.averaged_parameters().values()) // shares
    found = [_part(name, module.get_submodule(attribute)) for name, attribute in module.parts.items()]
    for part in found if shares > 1 else []:
        part.bytes = part.bytes // shares if part.name in module.trained_parts else part.bytes
    return Plan(
        found,
        gradients=held,
        optimizer=optimizer_bytes(config["optimizer"], trained) // shares,
        average=averaged * len(config["ema"].get("lengths", [0])) if config["ema"] else 0,
        phases=_phases(simulated, shares),
        shares=shares,
    )


def _shares(config: Mapping[str, Any]) -> int:
    """Among how many processes what is trained is cut."""
    if check_strategy(config["trainer"]) != "Sharded":
        return 1
    check_shares(config)
    return gpus_of(config) if module_kind(config) == "latent_diffusion" else 1  # an autoencoder is not cut


def gpus_of(config: Mapping[str, Any]) -> int:
    """How many GPUs train together: gpus=, else what trainer.num_nodes and devices say; 1 where they leave it open."""
    if config.get("gpus"):
        return int(config["gpus"])
    trainer = config["trainer"]
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, count) * int(nodes)


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


def _phases(simulated: Simulated, shares: int) -> dict[str, int]:
    """The most that lives during each phase beside weights, gradients, optimizer and average."""
    config, module, phases = simulated.config, simulated.module, {}
    if simulated.encodes:
        images = simulated.images()
        phases["pictures to latents"] = _peak(lambda: simulated.encode(images), simulated.half) + images.nbytes
    gradients, travels = sum(p.nbytes for p in module.trained_parameters().values()) // shares, ""
    if shares > 1:
        travels = gathered_in(str(config["trainer"]["precision"]), config["trainer"]["strategy"].get("gather_dtype"))
        assert simulated.diffusion is not None
        simulated.diffusion.model.to(DTYPES[travels])  # what travels so is not cast, and no cast is kept
    forward, both = _step(simulated)
    if shares > 1:
        assert simulated.diffusion is not None
        both = forward + gradients + gathered(simulated.diffusion.model, travels)
    elif config["accumulate"] > 1:  # the gradients of the micro-batches before are there
        phases = {name: peak + gradients for name, peak in phases.items()}
        both = max(both, forward + gradients)
    phases["loss and its gradients"] = both
    most = max(1, DECODED_AT_ONCE // config["image_size"] ** 2)
    drawn = min(-(-_pictures(config["callbacks"] or {}) // gpus_of(config)), most)
    if drawn and simulated.diffusion is not None:
        z = torch.empty(simulated.latent_shape(drawn), device="meta")
        phases[f"{drawn} {DECODED}"] = _peak(lambda: module.autoencoder.decode(z), simulated.half)
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


def _peak(function: Callable[[], Any], half: torch.dtype | None) -> int:
    """The most bytes that a computation without gradients has made and not yet dropped."""
    live = LiveBytes()
    with torch.no_grad(), live, GPUKernels(half):
        function()
    return live.peak


def _step(simulated: Simulated) -> tuple[int, int]:
    """The peaks of the forward pass, and of forward and backward pass together; the new gradients are in the latter."""
    simulated.module.train()
    live, kernels = LiveBytes(), GPUKernels(simulated.half)
    with live, kernels:
        if simulated.diffusion is not None:
            loss = simulated.denoising_loss(simulated.condition())
        else:
            loss = simulated.autoencoder_loss(simulated.images(torch.uint8))
    forward = live.peak
    kernels.forward_is_over()
    live.peak = live.now
    with live, kernels:
        backward(loss)
    return forward, max(forward, live.peak)
