"""The stages of one command: each a function of its configuration; results are shared by content."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.build import as_literal, build
from ldm.checkpoints.stages import alone
from ldm.config.check import check, module_kind
from ldm.config.choices import drop_leftovers
from ldm.config.root import option, plain
from ldm.data.fields import fields_of
from ldm.data.shards.splits import open_split
from ldm.data.shards.writer import Written
from ldm.errors import ConfigError, nearest
from ldm.evaluation.scoring import built_metrics
from ldm.launch import is_first
from ldm.sweep.measured import check_optimized, check_pruned, of_evaluation, of_training
from ldm.tasks.work.encode import encode_shards
from ldm.tasks.work.evaluate import evaluate_run
from ldm.tasks.work.prepare import prepare_shards
from ldm.tasks.work.prior import class_latents
from ldm.tasks.work.runs import say, trained
from ldm.training.distributed import processes
from ldm.training.run.build import built_arguments, check_builds
from ldm.training.run.captions import caption_templates, reads_captions
from ldm.training.run.directory import write_json
from ldm.training.run.fit import train_run


@dataclass
class Made:
    """What a stage gives."""

    told: dict[str, Any]  # for the report: path, samples ...
    passes: dict[str, Any] = field(default_factory=dict)  # keys of the configuration for the stages behind it
    metrics: dict[str, float] = field(default_factory=dict)
    run: Path | None = None  # of what it trained


def prior(values: dict[str, Any], command: Stages) -> Made:
    """Class pictures drawn by the model that is started from, as latents."""
    if command.config.class_shards:
        return Made({"path": command.config.class_shards})
    if "prepare" in command.stages and not command.config.shards:
        build(values["source"], "source").identity()  # no pictures: said before others are drawn for minutes
    written = _written("prior", values, lambda: class_latents(values))
    return Made({k: written[k] for k in ("path", "samples")}, {"class_shards": written["path"]})


def prepare(values: dict[str, Any], command: Stages) -> Made:
    """Shards of the source's pictures."""
    if command.config.shards:  # they are there already
        return Made({"path": command.config.shards})
    templates = caption_templates(values)
    if templates is not None and not templates.needs_captions and "uncaptioned" in values["source"]:
        values["source"]["uncaptioned"] = True
    written = _written("prepare", values, lambda: prepare_shards(values))
    passes = {"shards": written["path"]}
    if command.config.image_size is None:
        passes["image_size"] = written["facts"].get("image_size")
    return Made(written, passes)


def autoencoder(values: dict[str, Any], command: Stages) -> Made:
    """A first stage, trained once for all runs that agree on what decides it, or with module=autoencoder the run."""
    if command.is_autoencoder:
        finished = trained(command.config, values)
    else:
        folder = Path(values["outputs"]) / "stages"
        finished = train_run(values, lambda digest: folder / f"autoencoder-{digest}")
        say(finished)
    metrics = {f"autoencoder/{k}": v for k, v in finished.metrics.items() if k.startswith("val/")}
    told = {"path": str(finished.path), "step": finished.step}
    return Made(told, {"checkpoint": str(finished.path)}, metrics, finished.path)


def encode(values: dict[str, Any], command: Stages) -> Made:
    """Shards of latents."""
    if open_split(values["shards"], "train", fields=fields_of(values["data"])).kind == "latent":
        return Made({"path": values["shards"]})
    written = _written("encode", values, lambda: encode_shards(values))
    # The latents bring their autoencoder along.
    passes = {"shards": written["path"], "checkpoint": command.config.checkpoint}
    return Made({k: written[k] for k in ("path", "samples")}, passes)


def diffusion(values: dict[str, Any], command: Stages) -> Made:
    """The run itself."""
    finished = trained(command.config, values)
    told = {"path": str(finished.path), "step": finished.step}
    return Made(told, {"checkpoint": str(finished.path)}, finished.metrics, finished.path)


def evaluate(values: dict[str, Any], command: Stages) -> Made:
    """Scores of what was trained last, or is given."""
    # Runs of all seeds are scored on the same draws, which task=evaluate of any of them makes too.
    values["seed"] = (command.config.stages.evaluate or {}).get("seed", 0)
    # Where no diffusion model is, the autoencoder is scored.
    values["checkpoint"] = values["checkpoint"] or str(command.run_directory)

    def score() -> tuple[dict[str, float], str]:
        with alone(values["outputs"], "evaluate"):
            metrics, output = evaluate_run(values)
        return metrics, str(output)

    metrics, output = processes.by_first(score)
    return Made({"path": output}, metrics=metrics)


def report(values: dict[str, Any], command: Stages) -> Made:
    """The page of what was trained last."""
    from ldm.report.run import write_run  # pandas takes half a second

    def write() -> None:
        run, told = command.run_directory, {**command.made, "report": {}}
        for made in told.values():  # relative to the run, so that outputs/ may move as a whole
            if "path" in made:
                made["path"] = os.path.relpath(made["path"], run)
        write_json(run / "stages.json", told)
        path = write_run(run)
        print(f"pictures: {run / 'images'}\nreport: {path}")

    processes.by_first(write)
    return Made({})


STAGES: dict[str, Callable[[dict[str, Any], Stages], Made]] = {  # in order
    "prior": prior,
    "prepare": prepare,
    "autoencoder": autoencoder,
    "encode": encode,
    "diffusion": diffusion,
    "evaluate": evaluate,
    "report": report,
}


class Stages:
    """The stages of one command. Each has its own changes to the configuration; results are shared by content.

    shards, autoencoder and latents live in outputs/stages/, named by a digest of what decides them, so that another
    run or another arm of a sweep finds them; the diffusion model is the run itself.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.made: dict[str, Any] = {}  # stage -> what the report tells of it
        self.found: dict[str, Any] = {}  # keys that earlier stages pass on
        self.run_directory = Path()  # of what was trained last: the report's place
        unknown = [s for s in config.stages if s not in STAGES]
        if unknown:
            raise ConfigError(
                f"stages.{unknown[0]}: there is no such stage.{nearest(unknown[0], list(STAGES))} {', '.join(STAGES)}."
            )
        self.stages = [s for s in STAGES if config.stages.get(s, False) is not False]  # false leaves a stage out
        self.is_autoencoder = module_kind(config) == "autoencoder"  # type: ignore[arg-type]  # the run itself is one
        if self.is_autoencoder and "autoencoder" in self.stages:
            self.stages = [stage for stage in self.stages if stage != "diffusion"]  # which would train it once more
        if config.checkpoint and {"autoencoder", "diffusion"} <= set(self.stages):
            self.stages.remove("autoencoder")  # another one would not be that which the checkpoint's model knows
        self._check_inputs()
        for stage in self.stages:
            configured = self.configured(stage)
            check(configured)
            if stage in ("autoencoder", "diffusion"):  # refused now, not after hours
                built_arguments(plain(configured))
            if stage == ("autoencoder" if self.is_autoencoder else "diffusion"):
                check_pruned(plain(configured))
            if stage == "evaluate":
                built_metrics(plain(configured)["metric"])
        check_builds(plain(self.configured(self.stages[-1])))
        if config.optimized_metric:
            check_optimized(config.optimized_metric, self.measured())

    def _check_inputs(self) -> None:
        """ConfigError where a stage that is left out would have made what a later one needs."""
        trains = [s for s in ("autoencoder", "diffusion") if s in self.stages]
        given, model = bool(self.config.shards), bool(self.config.checkpoint or trains)
        lacking = {s: "data: leave stages.prepare on, give shards=PATH" for s in ("autoencoder", "encode", "diffusion")}
        if given or "prepare" in self.stages:
            lacking = {}
        if not (given or self.config.checkpoint or "autoencoder" in self.stages):
            lacking["encode"] = "a trained autoencoder: leave stages.autoencoder on, give checkpoint=RUN"
        if not model:
            lacking["evaluate"] = "a model: leave stages.diffusion or stages.autoencoder on, give checkpoint=RUN"
        if not trains:
            lacking["report"] = "a run: leave stages.diffusion or stages.autoencoder on"
        for stage in self.stages:
            if stage in lacking:
                raise ConfigError(f"stages.{stage} needs {lacking[stage]}, or leave it out, stages.{stage}=false.")
        if not self.stages:
            raise ConfigError("every stage is left out, so there is nothing to do: leave one of stages. on.")

    def run(self) -> dict[str, float]:
        self._require_captions()
        metrics: dict[str, float] = {}
        for stage in self.stages:
            started = time.time()
            values = plain(self.configured(stage))
            if is_first():
                print(f"--- {stage}", flush=True)
            made = STAGES[stage](values, self)
            self.found |= made.passes
            self.run_directory = made.run or self.run_directory
            metrics |= made.metrics
            self.made[stage] = {**made.told, "seconds": round(time.time() - started, 1)}
        return metrics

    def _require_captions(self) -> None:
        """What the last stage would miss is said before the first one trains."""
        if self.config.shards and "diffusion" in self.stages:
            values = plain(self.configured("diffusion"))
            if reads_captions(values):
                build(values["data"], "data").require_captions()

    def measured(self) -> set[str]:
        """Names of all that `run` will give."""
        names: set[str] = set()
        for stage in self.stages:
            values = plain(self.configured(stage))
            if stage == "autoencoder":
                names |= {f"autoencoder/{n}" for n in of_training(values) if not n.startswith("train/")}
            elif stage == "diffusion":
                names |= of_training(values)
            elif stage == "evaluate":
                names |= of_evaluation(values["metric"])
        return names

    def configured(self, stage: str) -> DictConfig:
        """The configuration of a stage: the whole one, with the stage's changes and what earlier stages made."""
        changes = dict(self.config.stages[stage] or {})
        # Another module than the run's has keys of its own, which the run's would refuse.
        apart = stage == "autoencoder" and not self.is_autoencoder
        of_module = changes.pop("module", {}) if apart else {}
        merged = OmegaConf.merge(self.config, changes, as_literal(self.found))
        assert isinstance(merged, DictConfig)
        if stage == "autoencoder":  # all of it is trained
            if apart:
                merged.module = OmegaConf.merge(option("module", "autoencoder"), of_module)
            merged.frozen_dtype = "float32"
        merged.stages = {}
        drop_leftovers(merged)
        return merged


def _written(stage: str, values: dict[str, Any], make: Callable[[], Written]) -> dict[str, Any]:
    """Shards that the first process makes, one at a time of all that share these outputs."""

    def written() -> dict[str, Any]:
        with alone(values["outputs"], stage):
            made = make()
        print(made, flush=True)
        found = {"path": str(made.output), "samples": made.samples, "facts": made.facts}
        return {**found, "rejected": dict(made.rejected)}

    return processes.by_first(written)
