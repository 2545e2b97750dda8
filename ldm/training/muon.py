"""Muon for the hidden matrices of a network, AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.devices import is_shared, laid_out_like, whole
from ldm.errors import ConfigError

# Five steps of this quintic bring singular values from (0, 1] to about 0.7 to 1.2 (Jordan et al. 2024): it trades
# exactness, which an update does not need, for speed.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """Jordan et al. 2024: momentum, made orthogonal, so that every direction of a matrix is learnt at the same rate.

    Convolutions count as matrices of (out, in * height * width). Updates are scaled to the root mean square that
    AdamW's have (Liu et al. 2025, equation 4), so one `lr` and one `weight_decay` serve both.

    `params` are (name, parameter) pairs; names that contain one of `adamw`, vectors, and tables (`...embedding.weight`:
    a step touches few of their rows, and rows are no directions of a map) are AdamW's.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        adamw: Sequence[str] = (),
    ):
        if not 0 <= momentum < 1:
            raise ConfigError(f"optimizer.momentum={momentum} must be at least 0 and below 1; 0.95 is usual.")
        named = list(params)
        matrices = [(n, p) for n, p in named if p.ndim >= 2 and not _is_adamws(n, adamw)]
        taken = {name for name, _ in matrices}
        others = [(n, p) for n, p in named if n not in taken]
        groups = [
            {"params": chosen, "orthogonal": orthogonal, "momentum": momentum}
            for chosen, orthogonal in ((matrices, True), (others, False))
            if chosen
        ]
        super().__init__(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, eps=eps, fused=True)
        # The gradient scaler must undo its scale before our part sees a gradient.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the matrices' gradients are used up by it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_matrices()
        super().step()
        return loss

    @torch.no_grad()
    def step_matrices(self) -> None:
        """Muon's part of a step; AdamW's is left to be made."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum" not in state:
                # The step is AdamW's: it does not load states without one.
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            state["step"] += 1
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            # Nesterov's look ahead; of a weight in shares each process makes the whole update, and takes its rows.
            update = whole(p.grad.lerp_(state["momentum"], group["momentum"])).flatten(1)
            p.grad = None  # AdamW passes over weights without gradient
            by_shape[(update.shape[0], update.shape[1])].append((p, update))
        for (rows, columns), members in by_shape.items():
            directions = orthogonal(torch.stack([update for _, update in members]))
            for (p, _), direction in zip(members, directions, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                direction = laid_out_like(direction.view(p.shape), p) if is_shared(p) else direction.view_as(p)
                p.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def state_bytes(named: Iterable[tuple[str, nn.Parameter]], adamw: Sequence[str] = ()) -> int:
    """What Muon keeps of these parameters from step to step: one momentum for a matrix, AdamW's two for the rest."""
    return sum(4 * p.numel() * (1 if p.ndim >= 2 and not _is_adamws(n, adamw) else 2) for n, p in named)


def _is_adamws(name: str, adamw: Sequence[str]) -> bool:
    return f".{name}".endswith(".embedding.weight") or any(part in name for part in adamw)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """(N, R, C) -> the nearest matrices with orthonormal rows or columns, roughly, by a Newton-Schulz iteration.

    Singular values end between 0.7 and 1.2, except those below 1e-3 of the largest, which need more steps.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)  # the Frobenius norm bounds the largest singular value
    x = _iterate_gram(x, steps) if x.shape[2] > 2 * x.shape[1] else _iterate(x, steps)
    return (x.mT if tall else x).to(matrices.dtype)


def _iterate(x: Tensor, steps: int) -> Tensor:  # (N, R, C), R <= C
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Tensor, steps: int) -> Tensor:
    """The same numbers: the factors are polynomials of one Gram matrix and commute, so they can be multiplied together
    as small square matrices and applied once. Half the time for 3x3 convolutions."""
    a, b, c = _QUINTIC
    gram = x @ x.mT
    total: Tensor | None = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        total = factor if total is None else factor @ total
        if step < steps - 1:
            gram = factor @ (gram @ factor)
    return x if total is None else total @ x
