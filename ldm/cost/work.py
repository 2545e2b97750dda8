"""The arithmetic of a training step, counted on the meta device by the part of the model that asks for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldm.memory.meta_step import GPUKernels, backward
from ldm.memory.simulated import Simulated
from ldm.training.muon import Muon

BACKWARD, RECOMPUTED, OPTIMIZER = "backward pass", "recomputed in it", "optimizer's products"


@dataclass(frozen=True)
class Shape:
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """An operation as it is called: a function, its arguments and those by name, `Shape`s in the place of tensors."""

    function: Any
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Size:
    """How much a call is.

    flops: two a multiplication with its addition, of matrix products (attention's two among them) and convolutions; 0
        of all else, as is usual. bytes: that it reads and writes.
    """

    flops: int
    bytes: int


@dataclass
class Work:
    """All that a part of a step does, views left out: how often each operation is called, and how much it is."""

    times: Counter[Call] = field(default_factory=Counter)
    sizes: dict[Call, Size] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return sum(n * self.sizes[call].flops for call, n in self.times.items())

    def __add__(self, other: Work) -> Work:
        return Work(self.times + other.times, self.sizes | other.sizes)


class Counted(TorchDispatchMode):
    """Within it operations on the meta device go into `work`, or into `again` where a backward pass repeats a part of
    the forward pass: checkpoints alone compute with gradients there."""

    def __init__(self, in_backward: bool = False):
        super().__init__()
        self.in_backward, self.work, self.again = in_backward, Work(), Work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(out)
        held = {id(t.untyped_storage()) for t in given}
        is_view = made and all(id(t.untyped_storage()) in held for t in made) and not function._schema.is_mutable
        if is_view or not made:
            return out
        work = self.again if self.in_backward and torch.is_grad_enabled() else self.work
        call = Call(function, _spec(args), tuple((k, _spec(v)) for k, v in sorted(kwargs.items())))
        work.times[call] += 1
        if call not in work.sizes:
            work.sizes[call] = Size(_flops(function, args, kwargs, out), sum(t.nbytes for t in (*given, *made)))
        return out


def _flops(function: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of one operation, by torch's formulas."""
    if function is torch.ops.aten.convolution_backward.default:  # torch's takes groups for none
        gradient, x, weight, transposed, asked = args[0], args[1], args[2], args[7], args[10]
        places = math.prod((x if transposed else gradient).shape[2:])
        return 2 * len(x) * places * weight.numel() * sum(asked[:2])
    formula = flop_registry.get(function._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _spec(tree: Any) -> Any:
    """Arguments of a call, hashable."""
    if isinstance(tree, Tensor):
        return Shape(tuple(tree.shape), tuple(tree.stride()), tree.dtype)
    return tuple(_spec(v) for v in tree) if isinstance(tree, list | tuple) else tree


def work_of(config: Mapping[str, Any]) -> dict[str, Work]:
    """What a micro-batch takes, by part, and the optimizer's step; ConfigError for what cannot be planned.

    What is not trained has no gradients of weights, what stands before it none at all: autograd says so here as it
    does in training.
    """
    step = Simulated(config)
    step.module.train()
    found: dict[str, Work] = {}

    def counted(name: str, function: Callable[..., Any], *args: Any) -> Any:
        with Counted() as counter, GPUKernels(step.half, fused=False):
            made = function(*args)
        found[name] = counter.work
        return made

    if step.diffusion is None:
        loss = counted("autoencoder and loss terms", step.autoencoder_loss, step.images(torch.uint8))
    else:
        if step.encodes:
            with torch.no_grad():
                counted("autoencoder, pictures to latents", step.encode, step.images())
        cond = counted("text encoder", step.condition)
        loss = counted("denoising network", step.denoising_loss, cond)
    with Counted(in_backward=True) as counter, GPUKernels(step.half, fused=False):
        backward(loss)
    found[BACKWARD] = counter.work
    if counter.again.times.total() > 1:  # one is the gradient that it begins with
        found[RECOMPUTED] = counter.again
    optimizer = step.module.configure_optimizers()["optimizer"] if _is_muon(config) else None
    if isinstance(optimizer, Muon):
        for parameter in step.module.trained_parameters().values():
            parameter.grad = torch.empty_like(parameter)
        with Counted() as counter:
            optimizer.step_matrices()
        found[OPTIMIZER] = counter.work
    return found


def _is_muon(config: Mapping[str, Any]) -> bool:
    return str(config["optimizer"]["_target_"]).endswith(".Muon")


def micro_batch(parts: Mapping[str, Work]) -> Work:
    """All parts but the optimizer's together."""
    return sum((work for name, work in parts.items() if name != OPTIMIZER), Work())
