"""AdamW with its state in 8 bits (Dettmers et al. 2022), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ldm.errors import ConfigError

BLOCK = 256  # numbers of a state that share one float32 scale, as bitsandbytes has it
SMALLEST = 4096  # smaller tensors keep their state in float32


def adamw8bit(
    params: Iterable[tuple[str, nn.Parameter]],
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit: 2 bytes of state a weight instead of 8.

    params: (name, parameter) pairs. ConfigError where bitsandbytes is missing or the weights are on no GPU.
    """
    chosen = [parameter for _, parameter in params]
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f'optimizer=adamw8bit needs bitsandbytes ({error}): pip install "ldm[8bit]", or choose optimizer=adamw.'
        ) from error
    if any(parameter.device.type == "cpu" for parameter in chosen):
        raise ConfigError(
            "optimizer=adamw8bit works on a GPU, and these weights are on the CPU: choose optimizer=adamw."
        )
    for parameter in chosen:
        # Its step would do so at the first update: a resumed run must begin in the layout that the other one had.
        parameter.data = parameter.data.contiguous()
    return AdamW8bit(chosen, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, eps=eps)


def state_bytes(named: Iterable[tuple[str, nn.Parameter]]) -> int:
    """What it keeps from step to step: two bytes a weight and two float32 scales a block; 8 bytes in small tensors."""
    sizes = [parameter.numel() for _, parameter in named]
    return sum(8 * n if n < SMALLEST else 2 * n + 8 * -(-n // BLOCK) for n in sizes)
