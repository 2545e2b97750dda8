"""The arithmetic of merging: models plus models, models plus LoRAs, LoRAs plus LoRAs, and a LoRA out of two models.

States are mappings from names to tensors. Functions that give a model give it name by name, so that a caller who reads
tensors from files and writes them into one never holds two models. All sums are float32, whatever is stored.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.adapters.content import Lora, LowRank
from ldm.errors import ConfigError

State = Mapping[str, Tensor]
Named = Iterator[tuple[str, Tensor]]


def weighted_sum(states: Sequence[State], ratios: Sequence[float]) -> Named:
    """sum_i ratio_i state_i. A ratio of 0 leaves a state out, so that [1, 0] is the first, bit for bit."""
    for name in states[0]:
        total = None
        for state, ratio in zip(states, ratios, strict=True):
            if ratio != 0:
                share = ratio * state[name].float()
                total = share if total is None else total.add_(share)
        yield name, torch.zeros_like(states[0][name]) if total is None else total


def add_difference(base: State, plus: State, minus: State, ratio: float = 1.0) -> Named:
    """base + ratio (plus - minus): what a model learnt since `minus`, given to another one.

    Input channels that base alone has, a model's that repaints, stay as they are.
    """
    for name in base:
        change = plus[name].float() - minus[name].float()
        if change.ndim == 4 and change.shape[1] < base[name].shape[1]:
            change = F.pad(change, (0, 0, 0, 0, 0, base[name].shape[1] - change.shape[1]))
        yield name, base[name].float() + ratio * change


def with_lora(state: State, part: str, loras: Sequence[Lora], ratios: Sequence[float]) -> Named:
    """W + sum_i ratio_i alpha_i/rank_i up_i down_i in every layer that a LoRA names; DoRA turns the rows as it says.

    part: what the layers' names begin with, "unet" or "text_encoder". ConfigError for a layer with DoRA and a second
    update: each stretches the rows to lengths of its own, so the result would hang on their order.
    """
    for name, weight in state.items():
        layer = f"{part}.{name.removesuffix('.weight')}"
        updates = [(u.layers[layer], r) for u, r in zip(loras, ratios, strict=True) if layer in u.layers and r != 0]
        if len(updates) > 1 and any(u.magnitude is not None for u, _ in updates):
            raise ConfigError(
                f"{layer} is changed by {len(updates)} LoRAs, one of which is a DoRA: that sets the lengths of the "
                "rows, so there is no sum of them. Merge one after the other, in the order that you want."
            )
        for update, ratio in updates:
            weight = update.merged(weight, ratio)
        yield name, weight


def combined(loras: Sequence[Lora], ratios: Sequence[float], rank: int | None = None) -> Lora:
    """One LoRA whose update is the weighted sum of several: their factors side by side, exactly, of the ranks' sum.

    rank: cut down to that many directions, the best there are (Eckart and Young 1936). ConfigError for DoRA, which is
    no sum, and for layers of different sizes.
    """
    names = dict.fromkeys(name for lora in loras for name in lora.layers)
    layers = {}
    for name in names:
        given = zip(loras, ratios, strict=True)
        updates = [(lora.layers[name], ratio) for lora, ratio in given if name in lora.layers and ratio != 0]
        if updates:
            layers[name] = _side_by_side(name, updates)
    largest = max((update.rank for update in layers.values()), default=0)
    if rank is not None:
        if rank > largest:
            raise ConfigError(
                f"rank={rank}: the sum has rank {largest} at most, so there is nothing to cut: omit rank=."
            )
        layers = {name: _cut(update, rank) for name, update in layers.items()}
    return Lora(layers)


@dataclass
class Difference:
    """What lies between two tensors, and the part of it that a low-rank update carries."""

    squared: float  # sum of squares of the difference
    carried: float = 0.0  # of its best approximation
    update: LowRank | None = None


def extracted(base: State, tuned: State, rank: int, layers: Container[str]) -> Iterator[tuple[str, Difference]]:
    """tuned - base, name by name, and in the weights of `layers` (paths) its best approximation of a rank.

    By the singular value decomposition (Eckart and Young 1936): up = U sqrt(S), down = sqrt(S) V^T, alpha = rank. A
    layer has no more directions than rows or columns: smaller ones are carried whole.
    """
    for name in base:
        change = tuned[name].float() - base[name].float()
        squared = float(change.double().square().sum())
        if squared == 0 or not name.endswith(".weight") or name.removesuffix(".weight") not in layers:
            yield name, Difference(squared)
            continue
        u, s, vt = torch.linalg.svd(change.flatten(1), full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        update = _factors(u[:, :kept] * root, root[:, None] * vt[:kept], change.shape[1:])
        yield name, Difference(squared, float(s[:kept].double().square().sum()), update)


def _side_by_side(name: str, updates: Sequence[tuple[LowRank, float]]) -> LowRank:
    if any(update.magnitude is not None for update, _ in updates):
        raise ConfigError(
            f"{name} is a DoRA, whose update hangs on the weight: merge it into a checkpoint, method=lora."
        )
    sizes = {(update.up.shape[0], *update.down.shape[1:]) for update, _ in updates}
    if len(sizes) > 1:
        found = " and ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise ConfigError(f"{name} is {found} in these LoRAs: they are for different architectures and have no sum.")
    up = torch.cat([ratio * u.alpha / u.rank * u.up.float().flatten(1) for u, ratio in updates], dim=1)
    down = torch.cat([u.down.float() for u, _ in updates])
    return _factors(up, down.flatten(1), down.shape[1:])


def _cut(update: LowRank, rank: int) -> LowRank:
    """The best approximation, from the factors alone: of (out, R)(R, in) the R x R core is decomposed."""
    q_up, r_up = torch.linalg.qr(update.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(update.down.flatten(1).T.double())
    u, s, vt = torch.linalg.svd(update.alpha / update.rank * r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = q_up @ u[:, :rank] * root, root[:, None] * (vt[:rank] @ q_down.T)
    return _factors(up.float(), down.float(), update.down.shape[1:])


def _factors(up: Tensor, down: Tensor, columns: torch.Size) -> LowRank:  # (out, r), (r, in...), (in,) or (in, k, k)
    """The update `up down` as it is stored: of a convolution up is one of 1x1."""
    rank = len(down)
    ones = (1,) * (len(columns) - 1)
    return LowRank(down.reshape(rank, *columns).contiguous(), up.reshape(-1, rank, *ones).contiguous(), float(rank))
