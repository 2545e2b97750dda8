"""A network's blocks: the layers that repeat, which are compiled, recomputed and sharded one by one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from ldm.errors import ConfigError

Compile = Literal["none", "blocks", "whole", "graphs"]
# A U-Net's blocks share their code and differ in width and resolution: torch's own limit, 8, is below one U-Net's.
LIMIT = 128


class Block(nn.Module):
    """Base of a layer that occurs many times in a network. One of your own network's inherits from it too."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a network, in the order of its submodules; [] where it has none."""
    if isinstance(network, Block):
        return [network]
    return [block for child in network.children() for block in blocks_of(child)]


def compile_network(network: nn.Module, how: Compile, backend: str = "inductor") -> None:
    """Compiles a network in place with torch.compile; its names, hooks and weights stay as they are.

    how: "blocks" compiles each block by itself, which takes seconds where the whole takes minutes, and runs as fast;
    "whole" the network at once; "graphs" the same as CUDA graphs, for sampling, where a step's launches cost more than
    its arithmetic. Another size is compiled once more, for all sizes. ConfigError for a network without blocks.
    """
    if how == "none":
        return
    torch._dynamo.config.recompile_limit = max(LIMIT, torch._dynamo.config.recompile_limit)
    if how == "blocks":
        blocks = blocks_of(network)
        if not blocks:
            raise ConfigError(
                f"compile=blocks: {type(network).__name__} says of no layer that it repeats: let its blocks inherit "
                "from ldm.models.block.Block, or use compile=whole."
            )
        for block in blocks:
            _compile(block, backend)
    elif how == "whole":
        _compile(network, backend)
    else:
        _compile(network, backend, mode="reduce-overhead", dynamic=False)
        replayed = network.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return replayed(*args, **kwargs).clone()  # the next replay writes where this one has written

        network.forward = forward


def _compile(module: nn.Module, backend: str, **options: Any) -> None:
    # The forward alone: hooks, which FSDP and loss terms have there, stay outside of what is compiled.
    module.forward = torch.compile(module.forward, backend=backend, **options)  # type: ignore[method-assign]
