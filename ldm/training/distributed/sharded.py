"""Training in shares: each process holds a piece of every weight, gradient, optimizer state and average (FSDP2)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import lightning as L
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import register_pytree_node

from ldm.diffusion.condition import Condition
from ldm.models.block import blocks_of
from ldm.training.distributed import processes
from ldm.training.distributed.processes import TIMEOUT
from ldm.training.distributed.strategy import DataParallel, gathered_in
from ldm.training.module import TrainedModule
from ldm.training.run.checkpoint_io import FolderCheckpointIO


class Sharded(DataParallel):
    """Zhao et al. 2023 (FSDP), in its second form: a block's weights are put together while it computes, then dropped.

    Cut are the parts that a run trains, block by block; what is frozen, and autoencoders, are whole in each process.
    Every micro-batch's gradients are summed at once, so that no process ever holds all of them.
    timeout: as in `DataParallel`.
    gather_dtype: in which weights travel and compute; null: bfloat16 with precision=bf16-mixed, else float32. There,
        float32 weights would be cast by autocast, and the casts of the whole model kept for the backward pass.
    """

    def __init__(self, timeout: float = TIMEOUT, gather_dtype: Literal["float32", "bfloat16"] | None = None):
        super().__init__(timeout)
        self.gather_dtype = gather_dtype

    def model_to_device(self) -> None:
        """Cuts the model, then moves the rest: of what is cut, no device ever holds more than a block and its share."""
        dtype = gathered_in(str(self.precision_plugin.precision), self.gather_dtype)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for part in cut_parts(self.lightning_module):  # type: ignore[arg-type]
            cut(part, mesh, None if dtype == "float32" else torch.bfloat16)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Autoencoders go the way of `DataParallel`; what is cut exchanges its gradients by itself."""
        if not any(isinstance(m, FSDPModule) for m in self.lightning_module.modules()):  # type: ignore[union-attr]
            super().configure_ddp()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """The first process writes; the others give their shares, one tensor after another."""
        io = self.checkpoint_io
        assert isinstance(io, FolderCheckpointIO)
        content = io.content(checkpoint)
        linked = processes.by_first(lambda: content.linked(io.previous))
        if self.is_global_zero:
            io.write(content, filepath)
        else:
            content.gather(linked)


def cut(part: nn.Module, mesh: DeviceMesh, gather_dtype: torch.dtype | None = None) -> None:
    """Cuts a module's parameters over processes, block by block, in place."""
    for p in part.parameters():
        p.data = p.data.contiguous()  # FSDP2 knows no other layout
    # Inputs keep their dtype: times and noise levels do not survive bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*(b for b in blocks_of(part) if b is not part), part]:
        # Dropped after each forward pass, the outermost's too: averages are put in their place for validation.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def cut_parts(module: L.LightningModule) -> list[nn.Module]:
    """What is cut of a module: the parts that it trains. None of an autoencoder, which is small, and has no forward."""
    assert isinstance(module, TrainedModule)
    parts = [] if module.kind == "autoencoder" else module.trained_parts
    return [module.get_submodule(module.parts[name]) for name in parts]


# What a text encoder gives: FSDP looks for the tensors in it.
register_pytree_node(
    Condition,
    lambda condition: ([getattr(condition, f.name) for f in fields(condition)], None),
    lambda values, _: Condition(*values),
)
