"""Scores of a checkpoint, and the pictures that they are of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.checkpoints.components import task_device
from ldm.checkpoints.folder import run_of
from ldm.checkpoints.load import load_any
from ldm.checkpoints.sampler import sampling_settings
from ldm.checkpoints.stages import to_native
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.data.fields import fields_of
from ldm.errors import ConfigError
from ldm.evaluation.cards import cards
from ldm.evaluation.drawing import FRACTION, evaluation_of, image_shards
from ldm.evaluation.scoring import built_metrics, check_count, scores
from ldm.pictures import grid, to_unit
from ldm.pipeline import Pipeline
from ldm.sweep.measured import check_optimized, of_evaluation
from ldm.training.run.directory import read_json, write_json
from ldm.training.run.wandb_mirror import add_scores
from ldm.untrusted import interpreted, number, shown


def evaluate(config: DictConfig) -> dict[str, float]:
    """Writes evaluation.json and picture grids into output=DIR, by default beside the checkpoint's run."""
    check(config, "evaluate")
    values = plain(config)
    if not values["checkpoint"]:
        raise ConfigError("task=evaluate needs checkpoint=RUN, for example checkpoint=outputs/mine.")
    check_optimized(values["optimized_metric"], of_evaluation(values["metric"]))
    values["checkpoint"] = str(to_native(values))
    result, output = evaluate_run(values)
    for name, value in sorted(result.items()):
        if "/low" not in name and "/high" not in name and not name.endswith(("/n", "/chance")):
            low, high = result.get(f"{name}/low"), result.get(f"{name}/high")
            print(f"{name:<34}{value:.4f}" + (f"  [{low:.3f}, {high:.3f}]" if low is not None else ""))
    print(f"evaluation: {output / 'evaluation.json'}")
    return result


def evaluate_run(config: dict[str, Any]) -> tuple[dict[str, float], Path]:
    """Scores of a checkpoint; an evaluation that is already there for the same checkpoint and request is read."""
    parts = load_any(config["checkpoint"], config["weights"])
    trained, folder = parts.config, parts.folder
    assert folder is not None
    output = Path(config["output"]) if config["output"] else run_of(folder) / f"evaluation-{config['weights']}"
    asked = {**{k: config[k] for k in ("seed", "metric", "weights")}, **sampling_settings(config, trained)}
    data, source = trained.get("data") or {}, f"{folder / 'config.yaml'}"
    if not isinstance(data.get("shards"), str | None) or "\0" in (data.get("shards") or ""):
        raise ConfigError(f"{source} says data.shards={shown(data['shards'])}: a path belongs there.")
    shards = config["shards"] or data.get("shards")
    if shards and not _same(shards, data.get("shards")):
        asked["shards"] = str(Path(shards).resolve())
    read = config["data"] if config["shards"] else data
    with interpreted(f"{source}: data.fields"):
        fields = fields_of(read)
    fraction = number(read.get("validation_fraction", FRACTION), "data.validation_fraction", source, 0, 1)
    if fields.mark():
        asked["fields"] = fields.mark()
    if fraction != FRACTION:
        asked["validation_fraction"] = fraction
    key = digest({**asked, "checkpoint": folder.name, "files": (folder / "manifest.json").read_text()})
    before = read_json(output / "evaluation.json")
    if before.get("key") == key and isinstance(before.get("metrics"), dict):
        return {k: math.nan if v is None else v for k, v in before["metrics"].items()}, output
    metrics = built_metrics(config["metric"])
    if parts.denoiser is not None:
        check_count(metrics, asked["eval_images"])
    images = image_shards(shards, fields, fraction)
    size = trained.get("image_size") or images["train"].facts.get("image_size")
    if not size:
        raise ConfigError(f"neither {source} nor {shards} says how large the pictures are: prepare the data again.")
    output.mkdir(parents=True, exist_ok=True)
    parts.for_sampling().to(task_device())
    pipe = None if parts.denoiser is None else Pipeline(parts).compile(config["compile"])
    evaluation = evaluation_of(parts.autoencoder, pipe, images, size, asked, Path(config["outputs"]) / "features")
    for half, drawn in evaluation.drawn.items():  # a sheet each
        grid(to_unit(drawn.bytes[:32]), drawn.captions[:32]).save(output / f"{half}.png")
    result = scores(metrics, evaluation)
    strange = {k: v for k, v in result.items() if not math.isfinite(v)}
    if strange:
        print(f"not finite, and null in evaluation.json: {', '.join(f'{k} is {v}' for k, v in strange.items())}")
    numbers = {"metrics": result | dict.fromkeys(strange)} | ({"not_finite": strange} if strange else {})
    about = {"key": key, "checkpoint": str(folder), "asked": asked}
    measured = {"cards": cards(metrics, result, evaluation, asked, size)}
    write_json(output / "evaluation.json", {**about, **numbers, **measured})
    group = "evaluation" if config["weights"] == "ema" else "evaluation-raw"
    add_scores(run_of(folder), {f"{group}/{k}": v for k, v in result.items() if v is not None})
    return result, output


def _same(path: str, other: str | None) -> bool:
    return bool(other) and Path(path).resolve() == Path(str(other)).resolve()
