"""The root of every configuration: its keys, which task reads which, and the checks made before anything is built."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.errors import ConfigError, nearest

TASKS = ("train", "sample", "evaluate", "prepare", "encode", "check", "objective", "convert", "merge", "plan")
FROZEN_DTYPES = ("float32", "bfloat16", "float16")


def key(default: Any, tasks: str, text: str) -> Any:
    """A root key: its default, the tasks that read it ("all" or names), and its line in --help."""
    return field(default=default, metadata={"tasks": _readers(tasks), "help": text})


def group(tasks: str, text: str) -> Any:
    """A configuration group: a folder of conf/, chosen by group=option."""
    return field(default=None, metadata={"tasks": _readers(tasks), "help": text, "group": True})


def _readers(tasks: str) -> tuple[str, ...]:
    """The tasks of a list of names; task=plan reads what task=train reads."""
    names = TASKS if tasks == "all" else tuple(tasks.split())
    return (*names, "plan") if "train" in names and "plan" not in names else names


@dataclass
class Root:
    """Every top-level key there is. Anything else, on the command line or in an experiment, is refused."""

    # --- what and where
    name: str | None = key(None, "train", "run directory under `outputs`; default: experiment, digest and seed")
    outputs: str = key("outputs", "all", "folder of all run directories")
    seed: Any = key(0, "train sample evaluate prepare", "an integer; for task=sample also a list, one seed an image")
    # --- data
    shards: str | None = key(
        None, "train encode evaluate check", "folder of tars that task=prepare or task=encode wrote"
    )
    images: str | None = key(None, "train prepare", "folder of captioned images (source=folder)")
    output: str | None = key(
        None, "sample prepare encode evaluate check objective convert merge plan", "what the task writes"
    )
    subject: str | None = key(
        None, "train", 'what templates= speak of, "sks dog": a rare word and what it is; free text'
    )
    instance_prompt: str | None = key(None, "train", 'one caption for all pictures, "a photo of sks dog"; free text')
    class_prompt: str | None = key(
        None, "train", 'caption of the class pictures of experiment=dreambooth, "a photo of a dog"; free text'
    )
    class_images: str | None = key(
        None,
        "train",
        "folder of class pictures, also with captions of their own; missing ones are drawn into it",
    )
    class_shards: str | None = key(None, "train", "latents of class pictures; default: what the stage prior made")
    num_class_images: int = key(100, "train", "class pictures that are held against forgetting")
    prior_weight: float = key(1.0, "train", "weight of the class pictures' loss beside the instance pictures'")
    image_size: int | None = key(None, "train prepare encode", "pixels a side; default: what prepare found out")
    batch_size: int = key(64, "train encode evaluate", "images per step, process and micro-batch")
    accumulate: int = key(1, "train", "micro-batches per optimizer step")
    # --- training
    frozen_dtype: str = key("float32", "train", "of what is not trained, in memory: float32, bfloat16 or float16")
    max_steps: int = key(1000, "train", "optimizer steps; a larger number continues a run of lr_scheduler=constant")
    caption_dropout: float = key(0.1, "train", "share of captions replaced by the empty one, for guidance")
    noises_per_image: int = key(1, "train", "(t, eps) pairs drawn for each encoded image")
    kl_weight: float = key(1e-6, "train", "weight of the KL term (module=autoencoder)")
    reconstruction: str = key("squared", "train", "error of module=autoencoder: squared, absolute or both")
    checkpoint: str | None = key(
        None,
        "train sample evaluate encode convert",
        "run, checkpoint folder, diffusers folder, .safetensors, .ckpt or hub id to start from",
    )
    weights: str = key(
        "ema", "train sample evaluate encode convert merge", "which weights of the checkpoint: ema or raw"
    )
    config: str | None = key(
        None,
        "sample convert train evaluate encode merge",
        "diffusers folder, or run or config.yaml of ours, that says what a single file of unpublished sizes does not",
    )
    adopt: bool | None = key(False, "train", "the architecture is the checkpoint's; null: where checkpoint= is given")
    scheduler_config: Any = key(None, "train", "diffusers' scheduler_config.json of an adopted checkpoint")
    export: str | None = key(None, "train", "also write the result as diffusers or compvis when training ends")
    stages: Any = field(
        default_factory=dict,
        metadata={"tasks": ("train", "plan"), "help": "stages of one command, in order, each with its own changes"},
    )
    # --- sampling
    prompt: str | None = key(None, "sample", "the text; free text, no quoting needed beyond the shell's")
    negative_prompt: str = key("", "sample", "what guidance leads away from")
    prompts: str | None = key(None, "sample", "text file with one prompt a line, instead of prompt=")
    height: int | None = key(None, "sample", "pixels; default: the model's own")
    width: int | None = key(None, "sample", "pixels; default: the model's own")
    num_steps: int | None = key(None, "sample evaluate train objective", "steps; default: the run's own, 30")
    guidance: float | None = key(None, "sample evaluate train", "1 is off; default: the run's own, 7.5")
    guidance_rescale: float | None = key(None, "sample evaluate train", "0.7 for zero-terminal-SNR models; as above, 0")
    eta: float | None = key(None, "sample evaluate", "share of fresh noise, for samplers that have it")
    num_images: int = key(1, "sample", "images per prompt")
    init_image: str | None = key(None, "sample", "picture to start from, or to repaint where mask= is white")
    strength: float | None = key(None, "sample", "share of the steps walked from init_image; 0.8, with a mask 1")
    mask: str | None = key(None, "sample", "picture of init_image's size: white is repainted")
    clip_skip: int = key(0, "sample", "layers of the text encoder left out for the prompt")
    chunked: bool = key(False, "sample", "read prompts longer than the text encoder's in pieces, instead of cutting")
    prompt_weights: bool = key(False, "sample", "(word:1.3), (word) and [word] weigh words")
    tiling: bool = key(False, "sample", "the autoencoder works in tiles, for pictures larger than memory")
    adapters: Any = key(
        None, "sample", "LoRAs, embeddings, hypernetworks and runs of ours on the model: [PATH,PATH:0.8] with weights"
    )
    film_strip: bool = key(False, "sample", "also draw every step's latent above its jump to x0")
    animation: bool = key(False, "sample", "also write the jumps to x0 as a GIF")
    eval_images: int | None = key(None, "train evaluate", "pictures drawn per half of the score; as above, 256")
    optimized_metric: str | None = key(None, "train evaluate", "what names the best arm of a sweep, such as val/loss")
    # --- conversion and merging
    format: str | None = key(None, "convert merge", "ldm, diffusers (a folder) or compvis (.safetensors, .ckpt)")
    dtype: str = key("float32", "convert merge", "of the stored tensors: float32, float16 or bfloat16")
    checkpoints: Any = key(
        None, "merge", "list of what is merged, in any layout; the first is what others are added to"
    )
    method: str = key("sum", "merge", "sum, add_difference (A + ratio (B - C)), lora (A and LoRAs) or extract (a LoRA)")
    ratios: Any = key(
        None, "merge", "list of weights: a checkpoint, a difference or a LoRA each; default: a mean, 1, 1"
    )
    rank: int | None = key(None, "merge", "of an extracted LoRA, or what a sum of LoRAs is cut down to")
    # --- groups
    task: Any = group("all", "what to do")
    experiment: Any = group("all", "a recipe: choices of all the groups below")
    source: Any = group("train prepare", "where prepare's images come from")
    data: Any = group("train encode evaluate check", "how shards are read")
    module: Any = group("train", "what is trained: the LightningModule with its loss, optimizer and average")
    loss: Any = group("train", "loss terms beside the module's own, one or several: loss=[representation_alignment]")
    model: Any = group("train", "the denoising network")
    autoencoder: Any = group("train", "the first stage")
    text_encoder: Any = group("train", "captions to conditions")
    scheduler: Any = group("train objective", "noise schedule")
    parameterization: Any = group("train objective", "what the network predicts")
    weighting: Any = group("train objective", "loss weight over noise levels")
    times: Any = group("train objective", "which noise levels are trained on")
    grid: Any = group("train sample evaluate objective", "spacing of the sampling steps")
    sampler: Any = group("train sample evaluate objective", "solver")
    guider: Any = group("train sample evaluate", "guidance")
    optimizer: Any = group("train", "optimizer")
    lr_scheduler: Any = group("train", "learning rate over steps")
    ema: Any = group("train", "averaged weights")
    templates: Any = group("train", "captions drawn from sentences around subject=")
    masking: Any = group("train", "what an inpainting model learns to repaint")
    adapter: Any = group("train", "what is trained beside a frozen model, one or several: adapter=[lora]")
    trainer: Any = group("train", "Lightning's Trainer: devices, precision, strategy")
    callbacks: Any = group("train", "what is watched, and how often")
    logger: Any = group("train", "W&B offline, online or none; metrics.jsonl is always written")
    metric: Any = group("train evaluate", "what evaluate measures")
    debug: Any = group("all", "fast_dev_run, overfit, profile, anomaly")
    local: Any = group("all", "settings of this machine, not in git")


def register() -> None:
    """Makes Root the schema that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="root", node=Root)


def conf_dir() -> Path:
    """The one folder of configurations: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parents[1]  # the package
    for folder in (here.parent / "conf", here / "conf"):
        if (folder / "config.yaml").is_file() and "ldm.root" in (folder / "config.yaml").read_text().split("\n", 1)[0]:
            return folder
    raise ConfigError(f"the configuration folder conf/ is neither beside nor inside {here}: install ldm again.")


def option(group: str, name: str) -> DictConfig:
    """What stands in conf/GROUP/NAME.yaml."""
    found = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    assert isinstance(found, DictConfig)
    return found


def group_names() -> list[str]:
    return [f.name for f in fields(Root) if f.metadata.get("group")]


def digest(value: Any, length: int = 8) -> str:
    """A short fingerprint of plain data, the same in every process."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def check_keys_are_read(task: str, overrides: Sequence[str]) -> None:
    """Refuses a command-line key that `task` does not read, naming the tasks that do."""
    by_name = {f.name: f for f in fields(Root)}
    for override in overrides:
        name = override.lstrip("+~").split("=", 1)[0].split(".")[0].split("@")[0].split("/")[0]
        known = by_name.get(name)
        if known is None and not name.startswith("hydra"):
            raise ConfigError(f"{name}= is no key and no group.{nearest(name, list(by_name))} See --help.")
        if known is not None and task not in known.metadata["tasks"]:
            readers = ", ".join(f"task={t}" for t in known.metadata["tasks"])
            raise ConfigError(f"{name}= is not read by task={task}, but by {readers}: leave it out.")


def plain(config: DictConfig | ListConfig) -> Any:
    """Plain containers, resolved: what is written to disk and into checkpoints.

    But for the root's `module`, which says by reference (`${optimizer}`) what stands beside it in the same file.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    if isinstance(config, DictConfig) and "module" in config and OmegaConf.is_dict(config.module):
        values["module"] = OmegaConf.to_container(config.module, resolve=False)
    return values


def reference(value: Any) -> str | None:
    """The key that a value such as `${optimizer}` stands for; None for other values."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return found[1] if found else None


def without_references(node: Any) -> Any:
    """What a node says itself: without the values that it takes from elsewhere in its configuration."""
    if isinstance(node, dict):
        return {k: without_references(v) for k, v in node.items() if reference(v) is None}
    return [without_references(v) for v in node if reference(v) is None] if isinstance(node, list) else node
