"""Keys and tasks: a task is a dataclass of the keys that it reads.

Keys that several tasks read stand here, in small dataclasses that tasks inherit; a task's own stand in its file of
ldm/tasks. Those files import what is heavy inside `run`, so that --help and refusals wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import DictConfig


def key(
    default: Any,
    text: str,
    *,
    holds: str = "",
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A key: its default, its line in --help, and what its value may be.

    holds: "text" (free text), "path" or "paths" ([PATH,PATH], or one), which need no quoting beyond the shell's.
    """
    about = {"help": text, "holds": holds, "choices": choices, "least": least, "most": most}
    return field(default_factory=dict, metadata=about) if default == {} else field(default=default, metadata=about)


def group(text: str) -> Any:
    """A configuration group: a folder of conf/, chosen by group=option."""
    return field(default=None, metadata={"help": text, "group": True})


@dataclass
class Task:
    """What can be done. conf/task/NAME.yaml names a subclass: its fields are the keys that task=NAME reads."""

    task: Any = group("what to do")
    experiment: Any = group("a recipe: choices of all the groups below")
    debug: Any = group("fast_dev_run, overfit, profile, anomaly")
    local: Any = group("settings of this machine, not in git")
    sweep: Any = group("how -m chooses its arms")
    outputs: str = key("outputs", "folder of all run directories", holds="path")

    own_folder: ClassVar[bool] = False  # output= is a folder, of which each arm of a sweep gets its own
    in_every_process: ClassVar[bool] = False  # of those that were started together; else the first one does it

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Does it. config: the composed configuration, whose keys are within their bounds; `ldm.config.check.check`
        also judges its groups. Returns its numbers, of which a sweep optimises one. Raises ConfigError for what a
        person can mend.
        """
        raise NotImplementedError


# --- keys of several tasks


@dataclass
class Output:
    output: str | None = key(None, "what the task writes", holds="path")


@dataclass
class Seeded:
    seed: Any = key(0, "an integer that all randomness follows from")


@dataclass
class Pictures:
    """Bare pictures, to be made shards of."""

    images: str | None = key(None, "folder of captioned images (source=folder)", holds="path")
    source: Any = group("where prepare's images come from")


@dataclass
class Shards:
    shards: str | None = key(None, "folder of tars that task=prepare or task=encode wrote", holds="path")
    data: Any = group("how shards are read")


@dataclass
class ImageSize:
    image_size: int | None = key(None, "pixels a side; default: what prepare found out")


@dataclass
class Batches:
    batch_size: int = key(64, "images per step, process and micro-batch", least=1)


@dataclass
class Weights:
    weights: str = key("ema", "which weights of the checkpoint: ema or raw", choices=("ema", "raw"))
    config: str | None = key(
        None,
        "diffusers folder, or run or config.yaml of ours, that says what a single file of unpublished sizes does not",
        holds="path",
    )


@dataclass
class Compiled:
    compile: str = key(
        "none",
        "torch.compile of the network: blocks (each by itself: soonest ready) or whole; to draw on a GPU, graphs",
        choices=("none", "blocks", "whole", "graphs"),
    )


@dataclass
class Checkpoint(Weights):
    checkpoint: str | None = key(
        None, "run, checkpoint folder, diffusers folder, .safetensors, .ckpt or hub id to start from", holds="path"
    )


@dataclass
class Diffused:
    """What is trained on, and what is predicted."""

    scheduler: Any = group("noise schedule")
    parameterization: Any = group("what the network predicts")
    weighting: Any = group("loss weight over noise levels")
    times: Any = group("which noise levels are trained on")


@dataclass
class Walked:
    """The steps from noise to a picture."""

    num_steps: int | None = key(None, "steps; default: the run's own, 30", least=1)
    grid: Any = group("spacing of the sampling steps")
    sampler: Any = group("solver")


@dataclass
class Guided(Walked):
    guidance: float | None = key(None, "1 is off; default: the run's own, 7.5")
    guidance_rescale: float | None = key(None, "0.7 for zero-terminal-SNR models; as above, 0")
    guider: Any = group("guidance")


@dataclass
class Drawn(Guided):
    eta: float | None = key(None, "share of fresh noise, for samplers that have it")


@dataclass
class Scored:
    eval_images: int | None = key(None, "pictures drawn per half of the score; as above, 256", least=1)
    optimized_metric: str | None = key(None, "what names the best arm of a sweep, such as val/loss")
    metric: Any = group("what evaluate measures")


@dataclass
class Stored:
    """How a checkpoint is written."""

    format: str | None = key(None, "ldm, diffusers (a folder) or compvis (.safetensors, .ckpt)")
    dtype: str = key("float32", "of the stored tensors: float32, float16 or bfloat16")
