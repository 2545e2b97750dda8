"""task=plan: what a training configuration takes on a GPU, before it is bought."""

from __future__ import annotations

import csv
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ldm.build import as_literal
from ldm.checkpoints.folder import find
from ldm.checkpoints.load import adopted
from ldm.config.check import check
from ldm.config.root import plain
from ldm.errors import ConfigError
from ldm.formats.content import DIFFUSION_NODES
from ldm.formats.kinds import is_ours
from ldm.memory.plan import Plan
from ldm.memory.plan import plan as make_plan
from ldm.training.distributed.strategy import check_strategy

GIB = 2**30
CARDS = (8, 12, 16, 24, 40, 80)  # GB of memory
CONTEXT = GIB  # assumed for CUDA's context and its kernels' workspaces


def plan(config: DictConfig) -> dict[str, float]:
    """Prints the table, the total and the cards that it fits; writes output=FILE (csv) where one is given."""
    check(config)
    check_strategy(plain(config.trainer))
    _adopt(config)
    made = make_plan(plain(config))
    rows = _rows(made)
    table = Table("what", "parameters", "trained", "GiB", title="memory of one process, computed, not measured")
    for name, parameters, trained, size in rows:
        table.add_row(name, f"{parameters:,}" if parameters else "", f"{trained:,}" if trained else "", gib(size))
    Console(width=110).print(table)
    largest = max(made.phases, key=lambda name: made.phases[name])
    print(
        f"total: {gib(made.total)} GiB at batch_size={config.batch_size}; of the phases the largest counts, {largest}"
    )
    print(f"fits, with 1 GiB assumed for CUDA's context and workspaces: {fits(made.total)}")
    if config.output:
        with Path(config.output).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("what", "parameters", "trained", "bytes"), *rows, ("total", "", "", made.total)])
        print(f"plan: {config.output}")
    return {"memory/total_gib": made.total / GIB}


def fits(total: int) -> str:
    """The cards that have room for so many bytes."""
    enough = [f"{card} GB" for card in CARDS if total + CONTEXT <= card * GIB]
    return ", ".join(enough) or f"none of {', '.join(map(str, CARDS))} GB"


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _rows(made: Plan) -> list[tuple[str, int, int, int]]:
    """(what, parameters, trained ones, bytes)."""
    rows = [(f"weights: {p.name}", p.parameters, p.trained, p.bytes) for p in made.parts]
    rows += [("optimizer", 0, 0, made.optimizer), ("average", 0, 0, made.average)]
    rows += [("gradients, within the phases", 0, 0, made.gradients)]
    return rows + [(f"phase: {name}", 0, 0, size) for name, size in made.phases.items()]


def _adopt(config: DictConfig) -> None:
    """With adopt=true the architecture is that of a checkpoint folder of ours; others would have to be converted."""
    if config.adopt is False or not config.checkpoint:
        return
    if not is_ours(Path(config.checkpoint)):
        raise ConfigError(
            f"task=plan writes nothing, so it does not convert checkpoint={config.checkpoint}: leave it out and name "
            "its architecture, for Stable Diffusion 1 model=unet_sd15 autoencoder=kl_f8 text_encoder=clip_l."
        )
    nodes = adopted(find(config.checkpoint), repaints=bool(config.masking))
    config.image_size = config.image_size or nodes["image_size"]
    for name in DIFFUSION_NODES:
        config[name] = as_literal(nodes[name])
