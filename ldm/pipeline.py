"""Load a trained model and draw: the one facade for programs and notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from ldm.build import build
from ldm.config import conf_dir, nearest
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.solver import Solver, Step
from ldm.errors import ConfigError
from ldm.pictures import to_pil
from ldm.sampling import Request, Sampler
from ldm.training.assemble import load_trained


class Pipeline:
    """A trained latent diffusion model, ready to draw.

    >>> pipe = Pipeline.load("outputs/mine")
    >>> pipe("a red star", num_steps=20, guidance=2.0, seed=0)[0].save("star.png")
    """

    def __init__(self, sampler: Sampler, config: dict[str, Any], folder: Path):
        self.sampler, self.config, self.folder = sampler, config, folder

    @classmethod
    def load(cls, path: str | Path, weights: str = "ema") -> Pipeline:
        """From a run directory (its newest checkpoint) or a checkpoint folder; ConfigError when it is neither."""
        parts, config, folder = load_trained(path, weights)
        if parts.denoiser is None or parts.text_encoder is None:
            raise ConfigError(
                f"{path} is an autoencoder: nothing to sample from. Give a run of module=latent_diffusion."
            )
        for module in (parts.autoencoder, parts.text_encoder, parts.denoiser.model):
            assert isinstance(module, torch.nn.Module)
            module.eval().requires_grad_(False)
        return cls(Sampler(parts.denoiser, parts.autoencoder, parts.text_encoder), config, folder)

    @property
    def image_size(self) -> int:
        """Pixels a side of the training images."""
        return self.config["image_size"]

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> list[Image.Image]:
        """Pictures; takes the options of `sample`."""
        return [to_pil(image) for image in self.sample(prompt, **options)]

    def sample(self, prompt: str | Sequence[str], **options: Any) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1]; takes the options of `steps`."""
        return self.sampler.sample(self.request(prompt, **options))

    def steps(self, prompt: str | Sequence[str], **options: Any) -> Iterator[Step]:
        """The sampler's steps: `pipe.decode(step.x0)` shows the jump to x0. Options as in `request`."""
        return self.sampler.steps(self.request(prompt, **options))

    def decode(self, x0: Tensor) -> Tensor:  # (B,C,h,w) standardised latents -> (B,3,H,W) in [-1, 1]
        return self.sampler.decode(x0)

    def request(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,  # pixels; None: as trained
        width: int | None = None,
        num_steps: int = 30,
        guidance: float = 7.5,
        guidance_rescale: float = 0.0,
        sampler: str | Path | Solver | None = None,  # name or YAML of conf/sampler; None: the model's own
        eta: float | None = None,
        seed: int | Sequence[int] = 0,  # one for all (they draw in turn), or one an image
        num_images: int = 1,  # per prompt
    ) -> Request:
        """What `steps`, `sample` and the call itself draw. ConfigError for what cannot be drawn."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if num_images < 1:
            raise ConfigError(f"num_images={num_images}: must be at least 1.")
        solver = _solver(sampler)
        if eta is not None:
            solver = (solver or _solver("ddim")).with_eta(eta)  # type: ignore[union-attr]
        return Request(
            prompts=[p for p in prompts for _ in range(num_images)],
            negative_prompts=[p for p in negative for _ in range(num_images)],
            height=height or self.image_size,
            width=width or self.image_size,
            num_steps=num_steps,
            guidance=guidance,
            seeds=[seed] if isinstance(seed, int) else list(seed),
            solver=solver,
            guider=ClassifierFree(rescale=guidance_rescale),
        )


def _solver(sampler: str | Path | Solver | None) -> Solver | None:
    if sampler is None or isinstance(sampler, Solver):
        return sampler
    given, folder = Path(sampler), conf_dir() / "sampler"
    path = given if given.suffix in (".yaml", ".yml") else folder / f"{sampler}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(
            f"sampler={sampler}: there is no such sampler.{nearest(str(sampler), names)} {', '.join(names)}."
        )
    return build(yaml.safe_load(path.read_text()), "sampler")
