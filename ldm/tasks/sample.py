"""task=sample: prompts to pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import DictConfig

from ldm.config.keys import Checkpoint, Compiled, Drawn, Output, Seeded, Task, key
from ldm.errors import ConfigError
from ldm.text import reading


@dataclass
class Sample(Drawn, Compiled, Checkpoint, Seeded, Output, Task):
    prompt: str | None = key(None, "the text; free text, no quoting needed beyond the shell's", holds="text")
    negative_prompt: str = key("", "what guidance leads away from", holds="text")
    prompts: str | None = key(None, "text file with one prompt a line, instead of prompt=", holds="path")
    num_images: int = key(1, "images per prompt", least=1)
    seed: Any = key(0, "an integer, or a list of them, one an image")
    height: int | None = key(None, "pixels; default: the model's own")
    width: int | None = key(None, "pixels; default: the model's own")
    init_image: str | None = key(None, "picture to start from, or to repaint where mask= is white", holds="path")
    strength: float | None = key(None, "share of the steps walked from init_image; 0.8, with a mask 1")
    mask: str | None = key(None, "picture of init_image's size: white is repainted", holds="path")
    clip_skip: int = key(0, "layers of the text encoder left out for the prompt")
    chunked: bool = key(False, "read prompts longer than the text encoder's in pieces, instead of cutting")
    prompt_weights: bool = key(False, "(word:1.3), (word) and [word] weigh words")
    tiling: bool = key(False, "the autoencoder works in tiles, for pictures larger than memory")
    adapters: Any = key(
        None,
        "LoRAs, embeddings, hypernetworks and runs of ours on the model: [PATH,PATH:0.8] with weights",
        holds="paths",
    )
    film_strip: bool = key(False, "also draw every step's latent above its jump to x0")
    animation: bool = key(False, "also write the jumps to x0 as a GIF")

    own_folder: ClassVar[bool] = True

    @staticmethod
    def run(config: DictConfig) -> dict[str, float]:
        """Writes PNGs with their recipe inside, a grid, and with film_strip=true the steps of the first pictures."""
        if not config.checkpoint:
            raise ConfigError("task=sample needs checkpoint=RUN, for example checkpoint=outputs/mine.")
        prompts = _prompts(config)
        from ldm.tasks.work.sample import sample

        return sample(config, prompts)


def _prompts(config: DictConfig) -> list[str]:
    if config.prompts:
        lines = reading.lines(reading.read_text(config.prompts, "prompts="))
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = [config.prompt] if config.prompt is not None else []
    if not prompts:
        raise ConfigError('task=sample needs a text: prompt="a red star", or prompts=FILE with one a line.')
    return prompts
