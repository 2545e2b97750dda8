"""Scores of a checkpoint, and the pictures that they are of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.autoencoders.kl import Autoencoder
from ldm.build import build
from ldm.checkpoints.components import task_device
from ldm.checkpoints.folder import run_of
from ldm.checkpoints.load import load_any
from ldm.checkpoints.sampler import sampling_settings
from ldm.checkpoints.stages import to_native
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.data.captions import SampleError
from ldm.data.fields import Fields, fields_of
from ldm.data.samples import sequential
from ldm.data.shards.reader import IndexedShards
from ldm.data.shards.splits import Shards, open_split, split_names
from ldm.data.sources.shapes import draw_captions, pairs_seen, pairs_unseen
from ldm.errors import ConfigError
from ldm.metrics.evaluation import Drawn, Evaluation, Scored
from ldm.pictures import grid, to_unit
from ldm.pipeline import Pipeline
from ldm.sweep.measured import check_optimized, of_evaluation
from ldm.training.run.directory import read_json, write_json
from ldm.training.run.wandb_mirror import add_scores
from ldm.untrusted import interpreted, number, shown

BATCH = 64
FRACTION = 0.02  # of data.validation_fraction, where nothing says another
UNSEEN_NOISE = 10_000_000  # evaluation seeds start here: no training picture or callback uses them


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
    images = image_shards(shards, fields, fraction)
    size = trained.get("image_size") or images["train"].facts.get("image_size")
    if not size:
        raise ConfigError(f"neither {source} nor {shards} says how large the pictures are: prepare the data again.")
    output.mkdir(parents=True, exist_ok=True)
    parts.for_sampling().to(task_device())
    pipe = None if parts.denoiser is None else Pipeline(parts).compile(config["compile"])
    result = scores(metrics, _evaluation(pipe, parts.autoencoder, images, size, asked, output))
    strange = {k: v for k, v in result.items() if not math.isfinite(v)}
    if strange:
        print(f"not finite, and null in evaluation.json: {', '.join(f'{k} is {v}' for k, v in strange.items())}")
    numbers = {"metrics": result | dict.fromkeys(strange)} | ({"not_finite": strange} if strange else {})
    write_json(output / "evaluation.json", {"key": key, "checkpoint": str(folder), "asked": asked, **numbers})
    group = "evaluation" if config["weights"] == "ema" else "evaluation-raw"
    add_scores(run_of(folder), {f"{group}/{k}": v for k, v in result.items() if v is not None})
    return result, output


def _evaluation(
    pipe: Pipeline | None,
    autoencoder: Autoencoder,
    images: dict[str, Shards],
    size: int,
    asked: dict[str, Any],
    output: Path,
) -> Evaluation:
    """Everything that metrics look at; what was drawn is also left as a sheet a half."""
    drawn = {}
    for half, captions in _captions(images, asked["eval_images"], asked["seed"]).items() if pipe else ():
        assert pipe is not None
        drawn[half] = Drawn(_draw(pipe, captions, asked, size), captions)
        grid(drawn[half].pictures[:32], captions[:32]).save(output / f"{half}.png")

    def real(split: str, limit: int | None = None) -> Iterator[Tensor]:
        return pictures_of(images[split], size, limit)

    @torch.no_grad()
    def reconstruct(pictures: Tensor) -> Tensor:
        latent = autoencoder.encode(pictures.to(autoencoder.latents.mean.device)).mode()
        return autoencoder.decode(latent).float().clamp(-1, 1).cpu()

    return Evaluation(list(images), real, reconstruct, drawn, asked["eval_images"], images["train"].facts)


def _same(path: str, other: str | None) -> bool:
    return bool(other) and Path(path).resolve() == Path(str(other)).resolve()


def built_metrics(node: dict[str, Any] | None) -> dict[str, Scored]:
    """The metrics of a configuration by their names; ConfigError for one that cannot be asked."""
    nodes = {} if not node else {"": node} if "_target_" in node else node
    made = {f"metric.{name}".rstrip("."): build(n, f"metric.{name}") for name, n in nodes.items() if n}
    for name, metric in made.items():
        if not isinstance(metric, Scored):
            raise ConfigError(
                f"{name}={type(metric).__module__}.{type(metric).__name__} has no method score(evaluation) that gives "
                "{name: number}, so nothing would ask it: write a class that has one around it, as in "
                "ldm/metrics/reconstruction.py (CONTRIBUTING.md), or leave it out."
            )
    return made


@torch.no_grad()
def scores(metrics: dict[str, Scored], evaluation: Evaluation) -> dict[str, float]:
    """What all metrics say, as floats; what is no score is said in a line each and left out."""
    result: dict[str, float] = {}
    for name, metric in metrics.items():
        given = metric.score(evaluation)
        if not isinstance(given, Mapping):
            print(f"{name}: score gave {type(given).__name__}, not {{name: number}}: it is left out.")
            continue
        for key, value in given.items():
            number = _number(value)
            if not isinstance(key, str) or number is None:
                print(f"{name}: {key!r} is {type(value).__name__}, not a number under a name: it is left out.")
            elif key in result:
                print(f"{name}: another metric has said {key!r} already: this one is left out.")
            else:
                result[key] = number
    return result


def _number(value: Any) -> float | None:
    """Real numbers and tensors or arrays of one; None for all else."""
    try:
        return None if isinstance(value, str | bytes | bool | complex) or value is None else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def image_shards(path: str | None, fields: Fields, fraction: float = FRACTION) -> dict[str, Shards]:
    """Splits of the images behind a path: of the parent, where the path holds latents.

    fraction: the share that the training held out, where the data have no val/ of their own.
    """
    if not path or not Path(path).exists():
        raise ConfigError(f"the data are not at {path} any more: give shards=PATH of the images to compare with.")
    first = open_split(path, "train", fraction, fields)
    parent = Path(path) if first.kind == "image" else Path(first.facts.get("parent", ""))
    if not parent.is_dir():
        raise ConfigError(f"{path} holds latents, and their images are not at {parent} any more: give shards=PATH.")
    return {
        name: open_split(parent, name, fraction, fields)
        for name in dict.fromkeys([*split_names(parent, fraction, fields), "val"])
    }


def pictures_of(shards: Shards, size: int, limit: int | None = None) -> Iterator[Tensor]:
    """Images in [-1, 1], in the order of the shards; those that cannot be read are left out."""
    chosen = range(min(len(shards), limit or len(shards)))
    for batch, _ in sequential(shards, size, 256, positions=chosen, fields=shards.reading.unread()):
        if batch:
            yield to_unit(batch["image"])


def _captions(images: dict[str, Shards], n: int, seed: int) -> dict[str, list[str]]:
    """What is drawn: for the shapes captions of pairs trained on and of pairs never seen, else validation captions."""
    facts = images["train"].facts
    if facts.get("source") == "shapes":
        fraction = facts["held_out_fraction"]
        halves = {"seen": pairs_seen(fraction), "unseen": pairs_unseen(fraction)}
        return {half: draw_captions(pairs, n, seed) for half, pairs in halves.items() if pairs}
    texts, reading = [], images["val"].reading.optional()
    for sample in IndexedShards(images["val"], range(min(n, len(images["val"]))), reading.caption_members):
        with suppress(SampleError):
            texts.append(reading.caption_of(sample) or "")
    return {"val": texts} if texts else {}


@torch.no_grad()
def _draw(pipe: Pipeline, captions: list[str], asked: dict[str, Any], size: int) -> Tensor:
    drawn = []
    settings = {k: asked[k] for k in ("num_steps", "guidance", "guidance_rescale", "sampler", "eta", "guider")}
    for first in range(0, len(captions), BATCH):
        prompts = captions[first : first + BATCH]
        request = pipe.request(
            prompts,
            height=size,
            width=size,
            seed=[UNSEEN_NOISE + asked["seed"] * 1_000_003 + first + i for i in range(len(prompts))],
            spacing=asked["grid"],
            **settings,
        )
        drawn.append(pipe.sampler.sample(request).cpu())
    return torch.cat(drawn)
