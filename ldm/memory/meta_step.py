"""A training step on the meta device: no numbers, but every tensor that would live, and when it dies."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# CUDA's autocast by torch's lists (ATen/autocast_mode.h), as far as networks here call them.
LOWERED = {F.linear, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
RAISED = {F.group_norm, F.layer_norm, F.interpolate, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss}
RAISED |= {Tensor.pow, torch.pow, Tensor.sum, torch.sum}


class LiveBytes(TorchDispatchMode):
    """Bytes of one device's tensors made within it that are alive: `now`, and the most there were, `peak`.

    A storage counts once, whatever views there are of it, from the operation that makes it to its last reference.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in self._storages((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if id(storage) not in before and id(storage) not in self._known:
                self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def died() -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.finalize(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.device.type == self.device]
        return [t.untyped_storage() for t in tensors]


class GPUKernels(TorchFunctionMode):
    """What a GPU runs where the meta device knows no better: fused attention, and autocast to `half` (None: none).

    Fused attention keeps q, k, v, its output and one number a query, never the scores. Autocast keeps one copy of every
    trained weight that it has cast until the forward pass is over; frozen weights are cast again at each use.
    fused: false leaves attention's two products to be seen, and its scores.
    """

    def __init__(self, half: torch.dtype | None, fused: bool = True):
        super().__init__()
        self.half, self.fused = half, fused
        self.kept: dict[int, Tensor] | None = {}

    def forward_is_over(self) -> None:
        self.kept = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = (self._cast(t, self.half) for t in args[:3])
            return _FusedAttention.apply(q, k, v) if self.fused else function(q, k, v)
        if self.half is not None and function in LOWERED:
            args = tuple(self._cast(a, self.half) for a in args)
            kwargs = {k: self._cast(v, self.half) for k, v in kwargs.items()}
        elif self.half is not None and function in RAISED:
            args = tuple(self._cast(a, torch.float32) for a in args)
            kwargs = {k: self._cast(v, torch.float32) for k, v in kwargs.items()}
        return function(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self.kept is None or not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = value.to(dtype)
        return self.kept[id(value)]


class _FusedAttention(torch.autograd.Function):
    """What flash attention (Dao et al. 2022) keeps and makes, without the numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B,N,L,D), (B,N,S,D), (B,N,S,D) -> (B,N,L,D)
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def backward(loss: Tensor) -> None:
    """`loss.backward()` with torch-function modes on, so that what is computed again meets the same kernels.

    torch's own functions put a mode aside while it handles them: the engine is called as they call it.
    """
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
