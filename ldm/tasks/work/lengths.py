"""Checkpoints with averages of other lengths, their scores, and the curve of scores against lengths."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from ldm.checkpoints.averages import average, exponent
from ldm.checkpoints.folder import find, read_manifest, run_of, with_averages
from ldm.config.check import check, fits
from ldm.config.root import plain
from ldm.errors import ConfigError
from ldm.formats.content import State
from ldm.pictures import curves
from ldm.sweep.measured import check_optimized, of_evaluation
from ldm.tasks.work.evaluate import evaluate_run


def make_lengths(config: DictConfig) -> dict[str, float]:
    """One checkpoint folder a length; of several, scores.csv, a picture of each score."""
    check(config, "evaluate")
    values = plain(config)
    if not values["checkpoint"]:
        raise ConfigError("task=ema needs checkpoint=RUN, of a run with ema=power: checkpoint=outputs/mine.")
    given = values["length"]
    if not fits(given, float | list[float]) or given == []:
        raise ConfigError(f"length={given}: give a number, or a list of them: length=[0.05,0.1,0.2].")
    lengths = sorted({float(n) for n in given}) if isinstance(given, list) else [float(given)]
    for length in lengths:
        exponent(length)
    check_optimized(values["optimized_metric"], of_evaluation(values["metric"]))
    source = find(values["checkpoint"])
    output = Path(values["output"]) if values["output"] else run_of(source) / "lengths"
    made = {length: _write(source, length, output / f"{length:g}") for length in lengths}
    if len(lengths) == 1:
        return {}
    rows = []
    for length, folder in made.items():
        scores, _ = evaluate_run({**values, "checkpoint": str(folder), "output": str(folder / "evaluation")})
        rows.append({"length": length, **scores})
    _summary(pd.DataFrame(rows), values["optimized_metric"], output)
    return {}


def _write(source: Path, length: float, target: Path) -> Path:
    step = read_manifest(source)["step"]
    parts: dict[str, State] = {}
    for name, tensor in average(run_of(source), length, step).items():
        part, _, inside = name.partition(".")
        parts.setdefault(part, {})[inside] = tensor
    with_averages(source, parts, target)
    print(f"average of length {length:g} at step {step}: {target}")
    return target


def _summary(table: pd.DataFrame, metric: str | None, output: Path) -> None:
    """All scores as a table; what has an interval, or the metric that was named, as a figure and on the screen."""
    table.to_csv(output / "scores.csv", index=False)
    shown = [metric] if metric else [name for name in table.columns if f"{name}/low" in table]
    print(table[["length", *shown]].to_string(index=False, float_format="{:.4f}".format))
    for name in shown:
        lines = {column: table[column].tolist() for column in (name, f"{name}/low", f"{name}/high") if column in table}
        picture = curves(table["length"].tolist(), lines, "length of the average", name)
        picture.save(output / f"{name.replace('/', '_')}.png")
    print(f"scores and curves: {output}")
