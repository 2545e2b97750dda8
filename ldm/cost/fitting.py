"""The cheapest settings with which a run fits a card."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.config.check import locate, module_kind
from ldm.config.root import option
from ldm.memory.plan import Plan, gpus_of, plan
from ldm.training.distributed.strategy import check_strategy

GIB = 2**30
CONTEXT = GIB  # assumed for CUDA's context and its kernels' workspaces
CARDS = (16, 24, 40, 80, 141)  # GB of memory
ENOUGH = 4  # pictures: a micro-batch of so many is taken to keep a GPU busy

Change = tuple[str, Callable[[dict[str, Any]], None]]  # as it is typed, and what it does to a resolved configuration


@dataclass(frozen=True)
class Fitting:
    """What to type so that a run fits, [] where it does already; the global batch stays. total: bytes it then takes."""

    overrides: list[str]
    batch_size: int
    total: int


class Fittings:
    """Looks for settings card by card; what a step takes is computed once for each setting, at one picture and at the
    batch asked for, and is a straight line between them."""

    def __init__(self, config: Mapping[str, Any], made: Plan):
        self.config = config
        self.whole = made  # of the configuration as it is
        self.tried: dict[int, tuple[Plan, Plan]] = {}
        self.ladder = savings(config)

    def for_card(self, size: int) -> Fitting | None:
        """The first settings with room in `size` GB, in the order of what they cost; None where nothing helps.

        Smaller micro-batches come before each next saving as long as they are large enough, below that after all.
        """
        room = size * GIB - CONTEXT
        asked = self.config["batch_size"]
        found = []
        for number in range(len(self.ladder) + 1):
            batch = asked
            while batch > 1 and self._total(number, batch) > room:
                batch = next(b for b in range(batch - 1, 0, -1) if asked % b == 0)
            total = self._total(number, batch)
            if total <= room:
                found.append(Fitting([*self._typed(number), *self._smaller(batch)], batch, total))
                if batch >= min(asked, ENOUGH):
                    return found[-1]
        return max(found, key=lambda fitting: fitting.batch_size, default=None)

    @property
    def all_typed(self) -> list[str]:
        """Every saving that was tried."""
        return self._typed(len(self.ladder))

    def _typed(self, number: int) -> list[str]:
        return [typed for typed, _ in self.ladder[:number]]

    def _smaller(self, batch: int) -> list[str]:
        times = self.config["batch_size"] // batch
        if times == 1:
            return []
        return [f"batch_size={batch}", f"accumulate={self.config['accumulate'] * times}"]

    def _total(self, number: int, batch: int) -> int:
        """Bytes with the first `number` savings."""
        one, whole = self._plans(number)
        asked = self.config["batch_size"]
        if batch == asked:
            return whole.total
        waiting = one.gradients if self.config["accumulate"] == 1 else 0  # those of the micro-batches before
        return round(one.total + (batch - 1) / (asked - 1) * (whole.total + waiting - one.total))

    def _plans(self, number: int) -> tuple[Plan, Plan]:
        if number not in self.tried:
            config = copy.deepcopy(dict(self.config))
            for _, change in self.ladder[:number]:
                change(config)
            whole = plan(config) if number else self.whole
            small = {**config, "batch_size": 1, "accumulate": max(2, config["accumulate"])}
            one = plan(small) if config["batch_size"] > 1 else whole
            self.tried[number] = one, whole
        return self.tried[number]


def savings(config: Mapping[str, Any]) -> list[Change]:
    """What can be changed for memory, each beside those before it, cheapest first."""
    diffusion, sharded = module_kind(config) == "latent_diffusion", check_strategy(config["trainer"]) == "Sharded"
    adamw = str(config["optimizer"]["_target_"]) == "torch.optim.AdamW"
    half = str(config["trainer"].get("precision")) == "bf16-mixed"
    found: list[Change] = []
    if diffusion and half and config["frozen_dtype"] == "float32":
        found.append(("frozen_dtype=bfloat16", lambda c: c.update(frozen_dtype="bfloat16")))
    if diffusion and gpus_of(config) > 1 and not sharded and adamw and not config.get("adapter"):
        found.append(("trainer=fsdp", _share))
    network = config["model"]
    can_recompute = "checkpoint" in inspect.signature(locate(network["_target_"], "model")).parameters
    if diffusion and can_recompute and network.get("checkpoint") != "blocks":
        typed = f"{'' if 'checkpoint' in network else '+'}model.checkpoint=blocks"
        found.append((typed, lambda c: c["model"].update(checkpoint="blocks")))
    if adamw and not sharded and not any(typed == "trainer=fsdp" for typed, _ in found):
        state = dict(option("optimizer", "adamw8bit"))
        found.append(("optimizer=adamw8bit", lambda c: c.update(optimizer=state)))
    return found


def _share(config: dict[str, Any]) -> None:
    strategy = option("trainer", "fsdp")["strategy"]
    config["trainer"] = {**config["trainer"], "strategy": dict(strategy)}
