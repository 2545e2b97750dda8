"""What decides the result of a run: all of its configuration but the short lists here.

A key that nobody thought of decides: at worst a run is made twice. The other way round, one run's weights pass for
another's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from ldm.config.check import locate, module_kind
from ldm.config.root import conf_dir, without_references
from ldm.config.schema import read_by_task_of
from ldm.errors import ConfigError
from ldm.training.module import is_beside

FORM = 2  # of what is written down; 1 named what decides, and missed some

NOT_DECISIVE = (
    # where it is, what it is called, what happens around it, how long it is
    *("name", "outputs", "output", "task", "experiment", "debug", "local", "stages", "export", "max_steps", "logger"),
    *("loss", "perturbation"),  # they stand in the module's node
    *("optimized_metric", "metric", "eval_images", "compile", "max_hours", "launcher", "sweep"),
    # paths, and what is made of them: their contents count (fingerprints of data, class pictures and checkpoints)
    *("shards", "images", "source", "checkpoint", "weights", "config", "adopt", "scheduler_config"),
    *("templates", "subject", "instance_prompt"),
    *("class_shards", "class_images", "class_prompt", "num_class_images", "prior_weight"),
    # what pictures are drawn with
    *("num_steps", "guidance", "guidance_rescale", "eta", "sampler", "grid", "guider"),
    # counted as the global batch
    *("batch_size", "accumulate"),
)
OF_THE_OTHER = {  # module -> what only the other one reads; an autoencoder is shared by runs that differ in the rest
    "autoencoder": (
        *("model", "text_encoder", "scheduler", "parameterization", "weighting", "times", "caption_dropout"),
        *("noises_per_image", "masking", "adapter", "frozen_dtype"),
    ),
    "latent_diffusion": ("kl_weight", "reconstruction"),
}
DATA = (
    *("shards", "batch_size", "accumulate", "threads", "prefetch", "max_bad", "resume"),
    *("validation_fraction", "validation_samples", "validation_batch_size"),  # the fraction is in the fingerprint
)
TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "max_steps", "max_epochs", "max_time", "benchmark"),
    *("deterministic", "detect_anomaly", "profiler", "log_every_n_steps", "limit_val_batches"),
    *(
        "num_sanity_val_steps",
        "check_val_every_n_epoch",
        "val_check_interval",
        "enable_checkpointing",
        "enable_progress_bar",
        "enable_model_summary",
    ),
    *("default_root_dir", "accumulate_grad_batches"),
)


def decisive(config: Mapping[str, Any], world_size: int = 1) -> dict[str, Any]:
    """The part of a resolved configuration that decides what one training run of it gives.

    Equal runs have equal ones: 2 processes of 8 and 16 in one, 1 and 1.0.
    """
    kind = module_kind(config)
    left_out = {*NOT_DECISIVE, *OF_THE_OTHER[kind]}
    found = {k: v for k, v in config.items() if k in read_by_task_of(config) - left_out}
    found["module"] = _module(config["module"])
    data, trainer = config["data"], config["trainer"]
    accumulate = config["accumulate"]
    found["global_batch"] = config["batch_size"] * accumulate * world_size
    found["data"] = {
        **_without(data, DATA),
        "global_batch": data.get("batch_size", 1) * data.get("accumulate", 1) * world_size,
    }
    found["trainer"] = {
        **_without(trainer, TRAINER),
        "accumulate_by_config": trainer.get("accumulate_grad_batches", 1) / accumulate,
    }
    strategy = trainer.get("strategy")
    compression = strategy.get("gradient_compression", "none") if isinstance(strategy, Mapping) else "none"
    if compression != "none":  # it rounds; without it, where and how a run is dealt out changes nothing
        found["trainer"]["gradient_compression"] = compression
    found["callbacks"] = {k: v for k, v in (config["callbacks"] or {}).items() if v and _decides(v, config["module"])}
    if isinstance(found.get("adapter"), Mapping):  # but for the format in which they leave
        found["adapter"] = {name: _without(node, ("format",)) for name, node in found["adapter"].items()}
    return _plain_numbers({"form": FORM, **found})


def _decides(callback: Mapping[str, Any], module: Mapping[str, Any]) -> bool:
    """Whether a callback may change what is trained: not if its class says `decides = False`, or is for others."""
    try:
        found: Any = locate(callback["_target_"], "callbacks")
    except (KeyError, ConfigError):  # whoever builds it says so
        return True
    return getattr(found, "decides", True) and is_beside(found, locate(module["_target_"], "module"))  # type: ignore[arg-type]


def _module(node: Mapping[str, Any]) -> Any:
    """The name of the option that a module's node is; what it says itself where it is none."""
    said = without_references(node)
    for file in sorted((conf_dir() / "module").glob("*.yaml")):
        if said == without_references(yaml.safe_load(file.read_text(encoding="utf-8"))):
            return file.stem
    return said


def _without(node: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {k: v for k, v in node.items() if k not in keys}


def _plain_numbers(value: Any) -> Any:
    """1.0 as 1, so that it does not matter which of the two was typed."""
    if isinstance(value, Mapping):
        return {k: _plain_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_numbers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
