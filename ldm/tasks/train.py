"""task=train: one training run, or the stages of an experiment in sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import DictConfig

from ldm.config.keys import (
    Batches,
    Checkpoint,
    Compiled,
    Diffused,
    Guided,
    ImageSize,
    Pictures,
    Scored,
    Seeded,
    Shards,
    Task,
    group,
    key,
)


@dataclass
class Train(Diffused, Guided, Scored, Compiled, Checkpoint, Pictures, Shards, ImageSize, Batches, Seeded, Task):
    name: str | None = key(None, "run directory under `outputs`; default: experiment, digest and seed", holds="path")
    stages: dict[str, Any] | None = key({}, "stages of one command, in order, each with its own changes")
    # --- how long, on what
    max_steps: int = key(1000, "optimizer steps; a larger number continues a run of lr_scheduler=constant", least=1)
    max_hours: float | None = key(
        None, "hours after which this command saves and exits with 75; the same command goes on", least=0
    )
    accumulate: int = key(1, "micro-batches per optimizer step", least=1)
    trainer: Any = group("Lightning's Trainer: devices, precision, strategy")
    launcher: Any = group("the processes of one host, started by the command itself")
    callbacks: Any = group("what is watched, and how often")
    logger: Any = group("W&B offline, online or none; metrics.jsonl is always written")
    export: str | None = key(
        None,
        "also write the result as diffusers or compvis when training ends",
        choices=("diffusers", "compvis", "ldm"),
    )
    compile: str = key(
        "none",
        "torch.compile of what is trained: blocks (each by itself: soonest ready) or whole",
        choices=("none", "blocks", "whole"),
    )
    # --- what is trained
    module: Any = group("what is trained: the LightningModule with its loss, optimizer and average")
    loss: Any = group("loss terms beside the module's own, one or several: loss=[representation_alignment]")
    perturbation: Any = group("what happens to latents before they are decoded (module=autoencoder), any number")
    model: Any = group("the denoising network")
    autoencoder: Any = group("the first stage")
    text_encoder: Any = group("captions to conditions")
    optimizer: Any = group("optimizer")
    lr_scheduler: Any = group("learning rate over steps")
    ema: Any = group("averaged weights")
    caption_dropout: float = key(0.1, "share of captions replaced by the empty one, for guidance", least=0, most=1)
    noises_per_image: int = key(1, "(t, eps) pairs drawn for each encoded image", least=1)
    kl_weight: float = key(1e-6, "weight of the KL term (module=autoencoder)", least=0)
    reconstruction: str = key("squared", "error of module=autoencoder: squared, absolute, both or huber")
    # --- from a model that is there
    adopt: bool | None = key(False, "the architecture is the checkpoint's; null: where checkpoint= is given")
    scheduler_config: Any = key(None, "diffusers' scheduler_config.json of an adopted checkpoint")
    adapter: Any = group("what is trained beside a frozen model, one or several: adapter=[lora]")
    frozen_dtype: str = key(
        "float32",
        "of what is not trained, in memory: float32, bfloat16 or float16",
        choices=("float32", "bfloat16", "float16"),
    )
    masking: Any = group("what an inpainting model learns to repaint")
    # --- from few pictures
    templates: Any = group("captions drawn from sentences around subject=")
    subject: str | None = key(
        None, 'what templates= speak of, "sks dog": a rare word and what it is; free text', holds="text"
    )
    instance_prompt: str | None = key(
        None, 'one caption for all pictures, "a photo of sks dog"; free text', holds="text"
    )
    class_prompt: str | None = key(
        None, 'caption of the class pictures of experiment=dreambooth, "a photo of a dog"; free text', holds="text"
    )
    class_images: str | None = key(
        None, "folder of class pictures, also with captions of their own; missing ones are drawn into it", holds="path"
    )
    class_shards: str | None = key(None, "latents of class pictures; default: what the stage prior made", holds="path")
    num_class_images: int = key(100, "class pictures that are held against forgetting", least=1)
    prior_weight: float = key(1.0, "weight of the class pictures' loss beside the instance pictures'", least=0)

    in_every_process: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Trains; with `stages` does each in turn, passing on what it made. What is there is not done again."""
        from ldm.tasks.work.train import train

        return train(config)
