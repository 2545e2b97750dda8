"""How Lightning sees the processes: as they were started, by our launcher, torchrun or srun. It starts none itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ldm.errors import ConfigError
from ldm.launch import Launch, launch
from ldm.training.distributed.processes import TIMEOUT, group, met

WHOLE = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
TORCHRUN = "Many hosts: torchrun --nnodes=HOSTS --nproc_per_node=N -m ldm.run ... trainer=ddp on each, or srun."
COMPRESSION: dict[str, Any] = {"none": None, "bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


class DataParallel(DDPStrategy):
    """Every process holds the whole model and a share of each batch.

    timeout: seconds after which a process that does not answer, or does not come to the step in which the others wait,
        ends the job by name. Longer than whatever one process does alone (pictures, checkpoints).
    static_graph: the caller's word that every step uses the same parameters, as often and in the same order. Not with
        accumulate above 1: torch's reducer fails on a first micro-batch that is not exchanged.
    gradient_compression: none, or bf16 or fp16, in which gradients are divided, summed and brought back to float32:
        half the bytes on the wire, and another result. fp16 reaches 65504 only.
    """

    def __init__(
        self,
        timeout: float = TIMEOUT,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        gradient_compression: str = "none",
    ):
        if gradient_compression not in COMPRESSION:
            raise ConfigError(
                f"trainer.strategy.gradient_compression={gradient_compression} is not known: choose one of "
                f"{', '.join(COMPRESSION)}."
            )
        super().__init__(
            timeout=timedelta(seconds=2 * timeout),
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
        )
        self.static_graph, self.gradient_compression = static_graph, gradient_compression

    def configure_ddp(self) -> None:
        """Wraps the module; Lightning's own `ddp_comm_hook` would be left out, without a word, on anything but CUDA."""
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if self.static_graph and trainer is not None and trainer.accumulate_grad_batches > 1:
            raise ConfigError(
                f"trainer.strategy.static_graph=true with accumulate={trainer.accumulate_grad_batches}: torch learns "
                "the graph at the first backward pass, which must exchange gradients: leave static_graph out, or "
                "accumulate=1."
            )
        super().configure_ddp()
        hook = COMPRESSION[self.gradient_compression]
        if hook is not None:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, hook)


class Launched(ClusterEnvironment):
    """The processes that torchrun or srun started, any number a host."""

    def __init__(self, here: Launch):
        super().__init__()
        self.here = here

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:  # the group is open before Lightning asks (processes.group)
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self.here.world_size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.here.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.here.local_rank

    def node_rank(self) -> int:
        return self.here.node

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


def timeout_of(trainer: dict[str, Any]) -> float:
    """Seconds, from a trainer's node."""
    strategy = trainer.get("strategy")
    seconds = strategy.get("timeout", TIMEOUT) if isinstance(strategy, dict) else TIMEOUT
    if not seconds > 0:
        raise ConfigError(f"trainer.strategy.timeout={seconds}: seconds, more than 0.")
    return float(seconds)


def check_strategy(trainer: dict[str, Any]) -> str:
    """The strategy's name; ConfigError for one that would start processes itself, or cut the model into pieces."""
    strategy = trainer.get("strategy", "auto")
    target = strategy.get("_target_", "") if isinstance(strategy, dict) else ""
    name = target.rsplit(".", 1)[-1] if target else strategy
    if name not in (*WHOLE, "DataParallel", "Sharded", "DDPStrategy", "SingleDeviceStrategy"):
        raise ConfigError(
            f"trainer.strategy={name}: checkpoints and averages know whole models (trainer=ddp) and models in shares "
            f"(trainer=fsdp), and no other strategy; task=plan says what fits."
        )
    return name


def gathered_in(precision: str, gather_dtype: str | None) -> str:
    """The type in which weights in shares travel: what is asked for, else what the precision computes in."""
    return gather_dtype or ("bfloat16" if precision == "bf16-mixed" else "float32")


def check_shares(config: Mapping[str, Any]) -> None:
    """ConfigError for what cannot be trained in shares (trainer=fsdp)."""
    trainer = config["trainer"]
    if check_strategy(trainer) != "Sharded":
        return
    precision = str(trainer.get("precision"))
    gathered = gathered_in(precision, trainer["strategy"].get("gather_dtype"))
    if precision == "16-mixed" or (gathered == "bfloat16" and precision != "bf16-mixed"):
        why = "losses are not scaled in shares" if precision == "16-mixed" else "bfloat16 weights need bf16-mixed"
        raise ConfigError(f"trainer.precision={precision} with trainer=fsdp: {why}. Use trainer.precision=bf16-mixed.")
    if config.get("compile") == "whole":
        raise ConfigError("compile=whole with trainer=fsdp: weights come together block by block. Use compile=blocks.")
    if str(config["optimizer"].get("_target_", "")).endswith("adamw8bit"):
        raise ConfigError("optimizer=adamw8bit with trainer=fsdp: its state cannot be cut. Use optimizer=adamw.")
    if config.get("adapter"):
        raise ConfigError(
            f"adapter=[{','.join(config['adapter'])}] with trainer=fsdp: it cuts what is trained, and adapters are "
            "small. Use trainer=ddp, and frozen_dtype=bfloat16 where the model beneath them is too large."
        )


def check_trainer(trainer: dict[str, Any]) -> None:
    """ConfigError for a trainer that does not fit how the processes were started."""
    name, here = check_strategy(trainer), launch()
    if here.world_size > 1:
        if name == "SingleDeviceStrategy":
            raise ConfigError(f"trainer.strategy={name} is for one process, not {here.world_size}: trainer=ddp.")
        return
    nodes = trainer.get("num_nodes", 1)
    if nodes not in (1, "1"):
        raise ConfigError(f"trainer.num_nodes={nodes}: this command starts processes on its own host only. {TORCHRUN}")


def local_processes(trainer: Mapping[str, Any]) -> tuple[int, list[int]]:
    """How many processes a trainer wants on this host, and the numbers of their GPUs where it names them."""
    devices = trainer.get("devices", 1)
    if devices in (-1, "-1", "auto"):
        return (1 if trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())), []
    text = str(devices).strip("[] ")
    named = [int(d) for d in text.split(",") if d.strip().isdigit()]
    if isinstance(devices, list) or "," in text:
        return max(1, len(named)), named
    return max(1, *named) if named else 1, []


def launched(trainer: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """A trainer's node as the processes are, and the plugins that tell Lightning so."""
    here, meeting, node = launch(), met(), dict(trainer)
    if meeting is not None:
        node["devices"], node["num_nodes"] = meeting.local_size, 1 + max(p.node for p in meeting.places)
        if node.get("strategy", "auto") == "auto":
            node["strategy"] = {"_target_": f"{DataParallel.__module__}.DataParallel"}
        on_gpu = node.get("accelerator", "auto") in ("gpu", "cuda") or (
            node.get("accelerator", "auto") == "auto" and torch.cuda.is_available()
        )
        if on_gpu and torch.cuda.device_count() < meeting.local_size:
            raise ConfigError(
                f"{meeting.local_size} processes on this host, and it has {torch.cuda.device_count()} GPUs: start "
                "one a GPU (srun: without --gpus-per-task, so that each sees all), or trainer.accelerator=cpu."
            )
    return node, [Launched(here)]


@contextmanager
def opened(trainer: L.Trainer) -> Iterator[None]:
    """The group that the trainer's strategy needs, of the backend that its device needs."""
    if not isinstance(trainer.strategy, DDPStrategy):
        yield
        return
    if met() is None:
        print("one process: trainer.devices=N starts N on this host, torchrun or srun on many", flush=True)
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"):
        yield
