"""task=plan: what a training run takes and costs, before it is paid for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Output, key
from ldm.tasks.train import Train


@dataclass
class Plan(Output, Train):
    gpu: str = key(
        "a100_80gb", "t4_16gb, v100_16gb, rtx3090_24gb, rtx4090_24gb, l40s_48gb, a100_40gb, a100_80gb, h100_80gb, "
        "h200_141gb (data sheets), or here: this machine, timed"
    )  # fmt: skip
    gpus: int | None = key(None, "how many train together; default: trainer.num_nodes x trainer.devices", least=1)
    gpus_per_node: int = key(8, "of one host", least=1)
    mfu: float | None = key(
        None, "share of the GPU's peak that is reached; default: 0.25, mosaicml/diffusion's on A100", least=0.01, most=1
    )
    price: float | None = key(None, "of a GPU for an hour, in any currency", least=0)
    network: float | None = key(
        None, "GB/s of a GPU to other hosts; default: of its maker's servers (3, 6, 25 or 50)", least=0.01
    )
    storage: float = key(1.0, "GB/s that a host reads of its data; assumed", least=0.001)
    dataset_images: float | None = key(None, "pictures to be trained on; default: what shards= holds", least=1)
    verify: bool = key(False, "also train a few steps here, on made-up pictures, and compare")

    in_every_process: ClassVar[bool] = False

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Prints tables of memory, arithmetic, time, cost and disk; writes output=FILE (csv) where one is given."""
        from ldm.tasks.work.plan import plan

        return plan(config)
