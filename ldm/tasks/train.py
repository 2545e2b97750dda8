"""task=train: one training run, or the stages of an experiment in sequence."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.build import as_literal, build
from ldm.checkpoints.adapters import save_adapters
from ldm.checkpoints.components import check_adapters
from ldm.checkpoints.folder import folder_name, read_config, run_of
from ldm.checkpoints.load import adopted, load_any
from ldm.checkpoints.sampler import sampling_settings
from ldm.checkpoints.save import save_any
from ldm.checkpoints.stages import alone, to_native
from ldm.config.check import check, module_kind
from ldm.config.choices import drop_leftovers
from ldm.config.root import option, plain
from ldm.data.fields import fields_of
from ldm.data.shards.splits import open_split
from ldm.data.shards.writer import Written
from ldm.errors import ConfigError, nearest
from ldm.formats.content import DIFFUSION_NODES
from ldm.formats.files.atomic import atomic_write
from ldm.formats.run_config import file_of
from ldm.models.inputs import inpainting_channels
from ldm.report import write_report
from ldm.sweep.measured import check_optimized, of_evaluation, of_training
from ldm.tasks.encode import encode_shards
from ldm.tasks.evaluate import built_metrics, evaluate_run
from ldm.tasks.prepare import prepare_shards
from ldm.tasks.prior import check_prior, class_latents
from ldm.training.callbacks.saving import Interrupted
from ldm.training.distributed import processes
from ldm.training.distributed.hosts import check_hosts
from ldm.training.distributed.strategy import check_trainer, timeout_of
from ldm.training.run.build import built_arguments, check_builds
from ldm.training.run.captions import caption_templates, reads_captions, refuse_unsaid
from ldm.training.run.directory import write_json
from ldm.training.run.fit import Finished, train_run

STAGES = ("prior", "prepare", "autoencoder", "encode", "diffusion", "evaluate", "report")


def train(config: DictConfig, arm: Path | None = None) -> dict[str, float]:
    """Trains; with `stages` does each in turn, passing on what it made. What is there already is not done again."""
    if config.adopt is None:
        config.adopt = bool(config.checkpoint)
    settle_sampling(config)
    check(config)
    check_trainer(plain(config.trainer))
    with processes.together(timeout_of(plain(config.trainer))):
        check_hosts(plain(config))
        return _train(config, arm)


def _train(config: DictConfig, arm: Path | None) -> dict[str, float]:
    templates = caption_templates(plain(config))  # refused before anything is read
    if config.adapter and "textual_inversion" in config.adapter and templates and not templates.needs_captions:
        refuse_unsaid(config.adapter.textual_inversion.placeholder, templates.all([]))
    check_prior(config)
    start_from_any_layout(config)
    if config.stages:
        return Stages(config, arm).run()
    check_builds(plain(config))
    if config.optimized_metric:
        check_optimized(config.optimized_metric, of_training(plain(config)))
    return _trained(config, plain(config), arm).metrics


def settle_sampling(config: DictConfig) -> None:
    """Fills in how pictures are drawn where that is left open: an adopted run's own settings, else the usual ones."""
    file = file_of(Path(config.checkpoint).expanduser()) if config.adopt and config.checkpoint else None
    for name, value in sampling_settings(plain(config), read_config(file.parent) if file else {}).items():
        config[name] = as_literal(value)
    second = config.guider.get("checkpoint")
    if second and Path(second).exists():  # a run is sampled from any working directory
        config.guider.checkpoint = as_literal(str(Path(second).resolve()))


def start_from_any_layout(config: DictConfig) -> None:
    """checkpoint= becomes a checkpoint folder of ours; with adopt=true the configuration takes its architecture."""
    if config.adapter and not config.checkpoint:
        raise ConfigError(
            f"adapter=[{','.join(config.adapter)}] is trained beside a model that is there already: give "
            "checkpoint=PATH, as with experiment=finetune."
        )
    if config.adopt and not config.checkpoint:
        raise ConfigError(
            "adopt=true needs the model to go on from: checkpoint=PATH (a run, a diffusers folder, a .safetensors or "
            ".ckpt, a hub id)."
        )
    if not config.checkpoint:
        return
    folder = Path(processes.by_first(lambda: str(to_native(config))))  # it may write a converted copy
    config.checkpoint = str(folder)
    if module_kind(config) == "latent_diffusion":
        check_adapters(plain(config), read_config(folder), folder)
    if not config.adopt:
        return
    nodes = adopted(folder)
    if config.masking:  # a model that repaints sees a mask and a masked latent too; fresh channels start at zero
        nodes["model"]["in_channels"] = inpainting_channels(nodes["model"].get("out_channels", 4))
    if config.image_size is None:
        config.image_size = nodes["image_size"]
    for name in (*DIFFUSION_NODES, "scheduler_config"):
        config[name] = as_literal(nodes[name])


def _trained(config: DictConfig, values: dict[str, Any], arm: Path | None) -> Finished:
    """One run, and what leaves it; also when a signal ends it before its last step."""
    try:
        finished = train_run(values, lambda digest: _directory(config, digest, arm))
    except Interrupted as stop:
        folder = stop.folder  # bound here: `stop` is gone after this block
        processes.by_first(lambda: _export(config, folder))
        raise
    _say(finished)
    processes.by_first(lambda: _export(config, finished.path / "checkpoints" / folder_name(finished.step)))
    return finished


def _export(config: DictConfig, checkpoint: Path) -> None:
    """The run's adapters, else its whole model, in export/; a refusal is printed, not raised. Older exports go."""
    if not config.export or module_kind(config) != "latent_diffusion":
        return
    run = run_of(checkpoint)
    whole = not config.adapter and config.export == "compvis"
    target = run / "export" / (checkpoint.name + (".safetensors" if whole else ""))
    try:
        if not target.exists():
            loaded = load_any(checkpoint)
            if loaded.adapters:
                with atomic_write(target) as part:
                    save_adapters(loaded.adapters, part, run.name)
            else:
                save_any(loaded, target, config.export)
        for older in set(target.parent.glob("step-*")) - {target}:
            shutil.rmtree(older) if older.is_dir() else older.unlink()
        for path in sorted(target.iterdir()) if config.adapter else [target]:
            print(f"export: {path}")
    except (ConfigError, OSError) as error:
        print(f"not exported: {error} Later: python -m ldm.run task=convert checkpoint={run} format= output=")


def _directory(config: DictConfig, digest: str, arm: Path | None) -> Path:
    if arm is not None:
        return arm
    return Path(config.outputs) / (config.name or f"{config.experiment}-{digest}-seed{config.seed}")


def _say(finished: Finished) -> None:
    did = "trained to" if finished.trained else "was finished before, at"
    if processes.is_first():
        print(f"{finished.path}: {did} step {finished.step}")


class Stages:
    """The stages of one command. Each has its own changes to the configuration; results are shared by content.

    shards, autoencoder and latents live in outputs/stages/, named by a digest of what decides them, so that another
    run or another arm of a sweep finds them; the diffusion model is the run itself.
    """

    def __init__(self, config: DictConfig, arm: Path | None):
        self.config, self.arm = config, arm
        self.made: dict[str, Any] = {}  # stage -> where its result is, for the report
        self.found: dict[str, Any] = {}  # keys that earlier stages pass on
        self.run_directory = Path()  # of what was trained last: the report's place
        unknown = [s for s in config.stages if s not in STAGES]
        if unknown:
            raise ConfigError(
                f"stages.{unknown[0]}: there is no such stage.{nearest(unknown[0], STAGES)} {', '.join(STAGES)}."
            )
        self.stages = [s for s in STAGES if config.stages.get(s, False) is not False]  # false leaves a stage out
        if config.checkpoint and {"autoencoder", "diffusion"} <= set(self.stages):
            self.stages.remove("autoencoder")  # another one would not be that which the checkpoint's model knows
        self._check_inputs()
        for stage in self.stages:
            check(self.configured(stage))
            if stage in ("autoencoder", "diffusion"):
                built_arguments(plain(self.configured(stage)))
            if stage == "evaluate":  # refused now, not after hours
                built_metrics(plain(self.configured(stage))["metric"])
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
            if processes.is_first():
                print(f"--- {stage}", flush=True)
            metrics.update(getattr(self, stage)(values))
            self.made[stage]["seconds"] = round(time.time() - started, 1)
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
        changes = self.config.stages[stage] or {}
        merged = OmegaConf.merge(self.config, changes, as_literal(self.found))
        assert isinstance(merged, DictConfig)
        if stage == "autoencoder":  # its own module, all of which is trained
            merged.module = OmegaConf.merge(option("module", "autoencoder"), changes.get("module", {}))
            merged.frozen_dtype = "float32"
        merged.stages = {}
        drop_leftovers(merged)
        return merged

    def prior(self, values: dict[str, Any]) -> dict[str, float]:
        if self.config.class_shards:
            self.made["prior"] = {"path": self.config.class_shards}
            return {}
        if "prepare" in self.stages and not self.config.shards:
            build(values["source"], "source").identity()  # no pictures: said before others are drawn for minutes
        written = _written("prior", values, lambda: class_latents(values))
        self.found["class_shards"] = written["path"]
        self.made["prior"] = {k: written[k] for k in ("path", "samples")}
        return {}

    def prepare(self, values: dict[str, Any]) -> dict[str, float]:
        if self.config.shards:  # they are there already
            self.made["prepare"] = {"path": self.config.shards}
            return {}
        templates = caption_templates(values)
        if templates is not None and not templates.needs_captions and "uncaptioned" in values["source"]:
            values["source"]["uncaptioned"] = True
        written = _written("prepare", values, lambda: prepare_shards(values))
        self.found["shards"] = written["path"]
        if self.config.image_size is None:
            self.found["image_size"] = written["facts"].get("image_size")
        self.made["prepare"] = written
        return {}

    def autoencoder(self, values: dict[str, Any]) -> dict[str, float]:
        folder = Path(values["outputs"]) / "stages"
        finished = train_run(values, lambda digest: folder / f"autoencoder-{digest}")
        _say(finished)
        self.found["checkpoint"] = str(finished.path)
        self.run_directory = finished.path
        self.made["autoencoder"] = {"path": str(finished.path), "step": finished.step}
        return {f"autoencoder/{k}": v for k, v in finished.metrics.items() if k.startswith("val/")}

    def encode(self, values: dict[str, Any]) -> dict[str, float]:
        if open_split(values["shards"], "train", fields=fields_of(values["data"])).kind == "latent":
            self.made["encode"] = {"path": values["shards"]}
            return {}
        written = _written("encode", values, lambda: encode_shards(values))
        # The latents bring their autoencoder along.
        self.found |= {"shards": written["path"], "checkpoint": self.config.checkpoint}
        self.made["encode"] = {k: written[k] for k in ("path", "samples")}
        return {}

    def diffusion(self, values: dict[str, Any]) -> dict[str, float]:
        finished = _trained(self.config, values, self.arm)
        self.found["checkpoint"] = str(finished.path)
        self.run_directory = finished.path
        self.made["diffusion"] = {"path": str(finished.path), "step": finished.step}
        return finished.metrics

    def evaluate(self, values: dict[str, Any]) -> dict[str, float]:
        # Runs of all seeds are scored on the same draws, which task=evaluate of any of them makes too.
        values["seed"] = (self.config.stages.evaluate or {}).get("seed", 0)
        # Where no diffusion model is, the autoencoder is scored.
        values["checkpoint"] = values["checkpoint"] or str(self.run_directory)

        def score() -> tuple[dict[str, float], str]:
            with alone(values["outputs"], "evaluate"):
                metrics, output = evaluate_run(values)
            return metrics, str(output)

        metrics, output = processes.by_first(score)
        self.made["evaluate"] = {"path": output}
        return metrics

    def report(self, values: dict[str, Any]) -> dict[str, float]:
        self.made["report"] = {}
        processes.by_first(self._report)
        return {}

    def _report(self) -> None:
        for made in self.made.values():  # relative to the run, so that outputs/ may move as a whole
            if "path" in made:
                made["path"] = os.path.relpath(made["path"], self.run_directory)
        write_json(self.run_directory / "stages.json", self.made)
        path = write_report(self.run_directory)
        print(f"pictures: {self.run_directory / 'images'}\nreport: {path}")


def _written(stage: str, values: dict[str, Any], make: Callable[[], Written]) -> dict[str, Any]:
    """Shards that the first process makes, one at a time of all that share these outputs."""

    def written() -> dict[str, Any]:
        with alone(values["outputs"], stage):
            made = make()
        print(made, flush=True)
        found = {"path": str(made.output), "samples": made.samples, "facts": made.facts}
        return {**found, "rejected": dict(made.rejected)}

    return processes.by_first(written)
