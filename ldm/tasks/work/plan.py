"""task=plan: what a training run takes and costs, before it is paid for."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ldm.build import as_literal
from ldm.checkpoints.folder import find
from ldm.checkpoints.load import adopted
from ldm.config.check import check
from ldm.config.root import plain
from ldm.cost.cards import HERE, MFU_SOURCE, PUBLISHED_MFU, Card, card
from ldm.cost.disk import Data, checkpoints_of, data_of
from ldm.cost.fitting import CARDS, CONTEXT, GIB, Fittings
from ldm.cost.rates import ByDataSheet, ByTiming
from ldm.cost.step import Network, Rates, Step, exchanged, network_of, step_of
from ldm.cost.trial import Trial, try_steps
from ldm.cost.work import OPTIMIZER, Work, micro_batch, work_of
from ldm.errors import ConfigError
from ldm.formats.content import DIFFUSION_NODES
from ldm.formats.kinds import is_ours
from ldm.memory.plan import Plan, gpus_of
from ldm.memory.plan import plan as memory_of
from ldm.memory.simulated import checked
from ldm.training.distributed.strategy import check_strategy

WIDTH = 110
FITS = "settings that make it fit"
COUNTED, GIVEN, FOLLOWS, ASSUMED = "counted", "given", "follows", "assumed"
SCALES = {  # of a unit, largest first
    "bytes": [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")],
    "FLOP": [(1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")],
    "s": [(1.0, "s"), (1e-3, "ms")],
}


@dataclass
class Row:
    """A number of the plan, in a unit of its own, and where it is from."""

    table: str
    what: str
    value: float | str
    unit: str
    source: str


def plan(config: DictConfig) -> dict[str, float]:
    """Prints tables of memory, arithmetic, time, cost and disk; writes output=FILE (csv) where one is given."""
    check(config)
    check_strategy(plain(config.trainer))
    _adopt(config)
    if config.image_size is None and config.source.get("image_size") and "prepare" in (config.stages or {}):
        config.image_size = config.source.image_size  # of pictures that are made here
    values = plain(config)
    if values["verify"] and values["gpu"] != HERE and not torch.cuda.is_available():
        raise ConfigError(
            f"verify=true trains here, where there is no GPU, and the plan is for gpu={values['gpu']}: add gpu={HERE}."
        )
    if values["mfu"] and values["gpu"] == HERE:
        raise ConfigError(f"mfu={values['mfu']:g} is a share of a data sheet's peak: leave it out, or gpu={HERE}.")
    bought = None if values["gpu"] == HERE else card(values["gpu"], checked(values))
    network = network_of(values, bought)
    memory, parts = memory_of(values), work_of(values)
    tried = try_steps(values) if values["verify"] else None  # before other work warms or fills this machine
    rates, of_rates = _rates(values, bought, sum(parts.values(), Work()))
    data = data_of(values)
    step = step_of(values, parts, memory, rates, network, data.read)
    rows = [*_memory(memory), *_arithmetic(values, parts), *of_rates, *_time(values, memory, network, step)]
    rows += [*_run(values, step, data), *_disk(values, memory, data), *_fitting(values, memory)]
    if tried is not None:
        rows += _verified(memory, step, tried)
    _print(rows)
    print(step.bottleneck)
    if bought is not None and memory.total + CONTEXT > bought.memory * GIB:
        print(f"It does not fit gpu={values['gpu']}: see what makes it fit {bought.memory} GB.")
    if config.output:
        with Path(config.output).open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
        print(f"plan: {config.output}")
    found = {row.what: row.value for row in rows}
    return {
        "memory/total_gib": memory.total / GIB,
        "time/step_seconds": step.seconds,
        "time/gpu_hours": float(found["GPU-hours"]),
    }


def _rates(values: dict[str, Any], bought: Card | None, work: Work) -> tuple[Rates, list[Row]]:
    if bought is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        timed = ByTiming(work, device)
        reached = work.flops / timed.seconds(work) / 1e9
        said = f"timed: {len(timed.taken)} of {len(work.times)} different operations, each alone"
        return timed, [Row("time", f"this machine's {device}", reached, "GFLOP/s", said)]
    half, mfu = checked(values), values["mfu"] or PUBLISHED_MFU
    kind = str(half or torch.float32).removeprefix("torch.")
    rows = [
        Row("time", f"peak of gpu={values['gpu']} in {kind}", bought.peak(half) / 1e12, "TFLOP/s", "data sheet"),
        Row("time", "share of the peak (mfu)", mfu, "", GIVEN if values["mfu"] else f"{ASSUMED}: {MFU_SOURCE}"),
    ]
    return ByDataSheet(bought, half, mfu), rows


def _memory(made: Plan) -> list[Row]:
    rows = [Row("parameters", p.name, p.parameters, "", COUNTED) for p in made.parts]
    rows += [Row("parameters", f"{p.name}, trained", p.trained, "", COUNTED) for p in made.parts if p.trained]
    found = {f"weights: {p.name}": p.bytes for p in made.parts}
    found |= {"optimizer": made.optimizer, "average": made.average, "gradients, within the phases": made.gradients}
    found |= {f"phase: {name}": size for name, size in made.phases.items()} | {"total": made.total}
    says = {"total": "of the phases the largest counts"}
    return rows + [Row("memory of one process", k, v, "bytes", says.get(k, COUNTED)) for k, v in found.items()]


def _arithmetic(values: dict[str, Any], parts: dict[str, Work]) -> list[Row]:
    batch, times = values["batch_size"], values["accumulate"]
    each = {k: w.flops / batch for k, w in parts.items() if k != OPTIMIZER}
    rows = [Row("arithmetic of a picture", k, flops, "FLOP", COUNTED) for k, flops in each.items()]
    total = times * micro_batch(parts).flops
    return [
        *rows,
        Row("arithmetic of a picture", f"a step of {batch} x {times} pictures, one process", total, "FLOP", FOLLOWS),
    ]


def _time(values: dict[str, Any], memory: Plan, network: Network, step: Step) -> list[Row]:
    shown = {
        "arithmetic": (step.compute, FOLLOWS),
        "optimizer and average": (step.optimizer, "at the least: bytes over the memory's bandwidth"),
    }
    rows: list[Row] = []
    if step.communication:
        behind = "all arithmetic" if memory.shares > 1 else "the last backward pass"
        sent = "gathered weights and gradients" if memory.shares > 1 else "gradients, in a ring"
        size = exchanged(values, memory) / 1e9
        shown["exchange between processes"] = step.communication, f"{size:.3g} GB of {sent}"
        shown["of it not hidden"] = step.exposed, f"{ASSUMED}: hides behind {behind}"
        many = f"{network.per_host} a host x {network.network / 1e9:g} GB/s, at most the link's {network.link / 1e9:g}"
        rows.append(Row("time", "ring through all GPUs", network.bandwidth / 1e9, "GB/s", f"{ASSUMED}: {many}"))
    shown["reading data, behind all else"] = step.data, f"{ASSUMED}: storage={values['storage']:g} GB/s a host"
    shown["a step"] = step.seconds, FOLLOWS
    return rows + [Row("time", name, seconds, "s", source) for name, (seconds, source) in shown.items()]


def _run(values: dict[str, Any], step: Step, data: Data) -> list[Row]:
    gpus, given = gpus_of(values), GIVEN if values["gpus"] else "from trainer="
    images = values["batch_size"] * values["accumulate"] * gpus
    seen, hours = images * values["max_steps"], step.seconds * values["max_steps"] / 3600
    rows = [
        Row("run", "GPUs", gpus, "", given),
        Row("run", "pictures a step", images, "", FOLLOWS),
        Row("run", "pictures a second", images / step.seconds, "", FOLLOWS),
        Row("run", "pictures a second, a GPU", images / step.seconds / gpus, "", FOLLOWS),
        Row("run", "steps", values["max_steps"], "", GIVEN),
        Row("run", "pictures seen", seen, "", FOLLOWS),
    ]
    if data.images:
        rows.append(Row("run", "epochs", seen / data.images, "", FOLLOWS))
    rows.append(Row("run", "hours", hours, "h", "without validation, pictures, checkpoints"))
    rows.append(Row("run", "GPU-hours", hours * gpus, "h", FOLLOWS))
    if values["price"] is not None:
        rows.append(Row("run", f"cost at {values['price']:g} a GPU-hour", hours * gpus * values["price"], "", FOLLOWS))
    return rows


def _disk(values: dict[str, Any], memory: Plan, data: Data) -> list[Row]:
    kept = checkpoints_of(values, memory)
    looked = "measured" if data.measured else ASSUMED
    found = {
        "a picture in its shard": (
            data.image,
            f"{looked}: LAION-400M's bytes a pixel" if looked == ASSUMED else looked,
        ),
        "a latent in its shard": (data.latent, FOLLOWS),
    }
    if data.images:
        found |= {
            f"{data.images:,.0f} pictures": (data.images * data.image, FOLLOWS),
            f"{data.images:,.0f} latents": (data.images * data.latent, FOLLOWS),
        }
    found |= {
        "what is trained and optimizer, a checkpoint": (kept.one, FOLLOWS),
        "frozen parts, which checkpoints share": (kept.frozen, FOLLOWS),
        f"checkpoints, at most {kept.kept} at once": (kept.kept * kept.one + kept.frozen, FOLLOWS),
    }
    if kept.snapshots:
        found["snapshots of averages (ema=power)"] = kept.snapshots, FOLLOWS
    return [Row("disk", name, size, "bytes", source) for name, (size, source) in found.items()]


def _fitting(values: dict[str, Any], memory: Plan) -> list[Row]:
    tries, rows = Fittings(values, memory), []
    for size in CARDS:
        found = tries.for_card(size)
        if found is None:
            words, taken = "does not fit", " ".join(["batch_size=1", *tries.all_typed, "do not help"])
        else:
            words, taken = (
                " ".join(found.overrides) or "as it is",
                f"{gib(found.total)} GiB; 1 {ASSUMED} for CUDA's context",
            )
        rows.append(Row(FITS, f"{size} GB", words, "", taken))
    return rows


def _verified(memory: Plan, step: Step, tried: Trial) -> list[Row]:
    table = "verified here"
    rows = [
        Row(table, "a step, planned", step.seconds, "s", FOLLOWS),
        Row(table, "a step, measured", tried.seconds, "s", "measured: median"),
        Row(table, "time, planned over measured", step.seconds / tried.seconds, "", FOLLOWS),
        Row(table, "memory, planned for the step", memory.of_step, "bytes", COUNTED),
        Row(table, "memory, measured", tried.bytes, "bytes", "measured: tensors at the peak"),
        Row(table, "memory, planned over measured", memory.of_step / tried.bytes, "", FOLLOWS),
    ]
    if tried.resident is not None:
        said = "measured: libraries' workspaces and gaps included"
        rows.append(Row(table, "growth of the process' memory", tried.resident, "bytes", said))
    return rows


def _print(rows: list[Row]) -> None:
    for title in dict.fromkeys(row.table for row in rows):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, width=WIDTH)
        words = title == FITS
        for column, ratio in (("what", 7 if words else 42), ("value", 60 if words else 26), ("from", 42)):
            table.add_column(column, ratio=ratio, justify="right" if column == "value" and not words else "left")
        for row in rows:
            if row.table == title:
                table.add_row(row.what, shown(row), "" if row.source in (COUNTED, FOLLOWS) else row.source)
        Console(width=WIDTH).print(table, "")


def shown(row: Row) -> str:
    """A value in a unit that a person reads."""
    if isinstance(row.value, str):
        return row.value
    value = float(row.value)
    if row.unit == "bytes" and row.table != "disk":
        return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"
    for unit, scales in SCALES.items():
        if row.unit == unit:
            size, name = next(((s, n) for s, n in scales if value >= s), scales[-1])
            return f"{value / size:,.4g} {name}"
    number = f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.3g}"
    return f"{number} {row.unit}".strip()


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


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
