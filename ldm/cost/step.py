"""How long a step takes and what it waits for: arithmetic, memory, the network, data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ldm.cost.cards import GIGA, Card
from ldm.cost.work import BACKWARD, OPTIMIZER, RECOMPUTED, Work, micro_batch
from ldm.memory.plan import Plan, gpus_of
from ldm.training.distributed.strategy import gathered_in
from ldm.training.run.frozen import DTYPES

COMPRESSED = {"none": 4, "bf16": 2, "fp16": 2}  # bytes of a gradient on the wire


class Rates(Protocol):
    """How fast a device is: seconds of arithmetic, and of moving bytes in its memory."""

    def seconds(self, work: Work) -> float: ...

    def to_move(self, size: float) -> float: ...


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step of one process; all others take as long.

    compute: of all micro-batches. behind: how much of it the exchange can hide behind. communication: of the whole
    exchange. data: in which the host reads what its processes train on, behind everything else.
    """

    compute: float
    behind: float
    optimizer: float
    communication: float
    data: float

    @property
    def exposed(self) -> float:
        """Of the exchange, what nothing hides."""
        return max(0.0, self.communication - self.behind)

    @property
    def busy(self) -> float:
        return self.compute + self.optimizer + self.exposed

    @property
    def seconds(self) -> float:
        return max(self.busy, self.data)

    @property
    def bottleneck(self) -> str:
        """What to change first, in a sentence."""
        shares = {
            "arithmetic": self.compute,
            "the GPU's own memory, in the optimizer and the average": self.optimizer,
            "the network between processes": self.exposed,
        }
        if self.data > self.busy:
            return f"The bottleneck is reading data: all else would take {self.busy / self.data:.0%} of that time."
        name = max(shares, key=lambda k: shares[k])
        return f"The bottleneck is {name}: {shares[name] / self.seconds:.0%} of a step."


@dataclass(frozen=True)
class Network:
    """gpus: processes in all, per_host of them on a host. link, network: bytes/s of one GPU, one way, to the others of
    its host and to other hosts."""

    gpus: int
    per_host: int
    link: float
    network: float

    @property
    def bandwidth(self) -> float:
        """Of one ring through all GPUs: rings side by side use every network card of a host."""
        if self.gpus <= self.per_host:
            return self.link
        return min(self.link, self.per_host * self.network)

    def all_reduce(self, size: float) -> float:
        """Seconds in which all hold the sum of `size` bytes: a ring sends 2 (N - 1) / N of them (Patarasuk and Yuan
        2009)."""
        return 2 * self.all_gather(size)

    def all_gather(self, size: float) -> float:
        """Seconds in which all hold what each had a share of, or a share of the sum of what all had (reduce-scatter):
        (N - 1) / N of `size` bytes."""
        return (self.gpus - 1) / self.gpus * size / self.bandwidth


def network_of(config: Mapping[str, Any], card: Card | None) -> Network:
    """The network that the keys describe; what they leave open is the card's."""
    gpus = gpus_of(config)
    link, network = (card.link, card.network) if card else (float("inf"), float("inf"))
    per_host = min(gpus, int(config.get("gpus_per_node") or 8))
    return Network(gpus, per_host, link * GIGA, (config.get("network") or network) * GIGA)


def step_of(
    config: Mapping[str, Any], parts: Mapping[str, Work], memory: Plan, rates: Rates, network: Network, image: float
) -> Step:
    """A step of `accumulate` micro-batches. image: bytes of one picture, or latent, as it is read.

    The exchange of a step is hidden behind the last backward pass, with trainer=fsdp behind all arithmetic.
    """
    accumulate, batch = config["accumulate"], config["batch_size"]
    compute = accumulate * rates.seconds(micro_batch(parts))
    backward = rates.seconds(parts[BACKWARD] + parts.get(RECOMPUTED, Work()))
    products = rates.seconds(parts.get(OPTIMIZER, Work()))
    gradients, behind = exchanged(config, memory), backward
    if memory.shares > 1:
        travels = DTYPES[gathered_in(str(config["trainer"]["precision"]), _strategy(config).get("gather_dtype"))]
        weights = gradients * travels.itemsize / torch.float32.itemsize
        communication = accumulate * network.all_gather(2 * weights + gradients)
        behind = compute
    else:
        communication = network.all_reduce(gradients)
    read = batch * accumulate * network.per_host * image
    return Step(
        compute,
        behind,
        products + rates.to_move(optimizer_traffic(memory)),
        communication,
        read / (config["storage"] * GIGA),
    )


def exchanged(config: Mapping[str, Any], memory: Plan) -> int:
    """Bytes of all gradients as they travel."""
    size = COMPRESSED[_strategy(config).get("gradient_compression", "none")]
    return sum(p.trained for p in memory.parts) * size


def optimizer_traffic(memory: Plan) -> int:
    """Bytes that a step reads and writes in a process' memory, at the least: gradients for their norm, to be clipped
    and for the step; weights and moments to be changed; averages with the weights that they move to."""
    weights = memory.gradients  # float32 both, and cut into the same shares
    return 4 * memory.gradients + 2 * weights + 2 * memory.optimizer + 2 * memory.average + memory.average


def _strategy(config: Mapping[str, Any]) -> Mapping[str, Any]:
    node = config["trainer"].get("strategy")
    return node if isinstance(node, Mapping) else {}
