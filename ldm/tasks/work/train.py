"""task=train: one training run, or the stages of an experiment in sequence."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.build import as_literal, build
from ldm.checkpoints.components import check_adapters
from ldm.checkpoints.folder import read_config
from ldm.checkpoints.load import adopted
from ldm.checkpoints.sampler import sampling_settings
from ldm.checkpoints.stages import to_native
from ldm.config.check import check, module_kind
from ldm.config.root import plain
from ldm.config.schema import looked_in
from ldm.errors import ConfigError
from ldm.formats.content import DIFFUSION_NODES
from ldm.formats.run_config import file_of
from ldm.launch import launch
from ldm.sweep.arms import Arm
from ldm.sweep.measured import check_optimized, check_pruned, of_training
from ldm.tasks.work.prior import check_prior
from ldm.tasks.work.runs import trained
from ldm.tasks.work.stages import Stages
from ldm.training.distributed import processes
from ldm.training.distributed.hosts import check_hosts
from ldm.training.distributed.launcher import Launcher
from ldm.training.distributed.strategy import check_shares, check_trainer, local_processes, timeout_of
from ldm.training.run.build import built_arguments, check_builds
from ldm.training.run.captions import caption_templates, refuse_unsaid


def train(config: DictConfig) -> dict[str, float]:
    """Trains; with `stages` does each in turn, passing on what it made. What is there already is not done again."""
    if config.adopt is None:
        config.adopt = bool(config.checkpoint)
    if config.stages is None:
        config.stages = {}
    settle_sampling(config)
    check(config)
    trainer = plain(config.trainer)
    check_trainer(trainer)
    check_shares(plain(config))
    wanted, devices = local_processes(trainer)
    launcher: Launcher = build(config.launcher, "launcher") or Launcher()
    if not launch().by and (wanted > 1 or launcher.max_restarts):
        arm = Arm.current()
        said = OmegaConf.to_container(config)  # with its references: a stage changes what they refer to
        job = {"config": said, "arm": arm and asdict(arm), "folders": looked_in()}
        return launcher.run(job, wanted, devices)
    if launcher.max_restarts and launch().by != "launcher":
        raise ConfigError(
            f"launcher.max_restarts={launcher.max_restarts}: {launch().by} started these processes, and starts them "
            "again (exit code 75: the same command goes on). Leave it out."
        )
    with processes.together(timeout_of(trainer)):
        check_hosts(plain(config))
        return _train(config)


def _train(config: DictConfig) -> dict[str, float]:
    templates = caption_templates(plain(config))  # refused before anything is read
    if config.adapter and "textual_inversion" in config.adapter and templates and not templates.needs_captions:
        refuse_unsaid(config.adapter.textual_inversion.placeholder, templates.all([]))
    check_prior(config)
    start_from_any_layout(config)
    if config.stages:
        return Stages(config).run()
    built_arguments(plain(config))
    check_builds(plain(config))
    check_pruned(plain(config))
    if config.optimized_metric:
        check_optimized(config.optimized_metric, of_training(plain(config)))
    return trained(config, plain(config)).metrics


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
    nodes = adopted(folder, repaints=bool(config.masking))
    if config.image_size is None:
        config.image_size = nodes["image_size"]
    for name in (*DIFFUSION_NODES, "scheduler_config"):
        config[name] = as_literal(nodes[name])
