"""Load a model from anywhere and draw: the one facade for programs and notebooks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.build import build
from ldm.checkpoints.adapters import load_adapters
from ldm.checkpoints.components import Components
from ldm.checkpoints.load import load_any
from ldm.checkpoints.sampler import sampling_settings, solver_of
from ldm.checkpoints.save import save_any
from ldm.data.transforms import to_rgb
from ldm.diffusion.grids import Spacing
from ldm.diffusion.guidance import Autoguidance, Guider
from ldm.diffusion.samplers.solver import Solver, Step
from ldm.errors import ConfigError
from ldm.models.block import Compile, compile_network
from ldm.pictures import from_pil, to_pil
from ldm.sampling import Request, Sampler
from ldm.text.prompts import Prompts
from ldm.text.reading import NotText, checked

Picture = Image.Image | str | Path | Tensor
Texts = str | Sequence[str]


class Pipeline:
    """A latent diffusion model, ready to draw.

    >>> pipe = Pipeline.load("outputs/mine")
    >>> pipe("a red star", num_steps=20, guidance=2.0, seed=0)[0].save("star.png")
    """

    def __init__(self, parts: Components):
        assert parts.denoiser is not None and parts.text_encoder is not None and parts.folder is not None
        self.parts, self.config, self.folder = parts, parts.config, parts.folder
        self.scheduler_config, self.adapters = parts.scheduler_config, parts.adapters
        self.sampler = Sampler(parts.denoiser, parts.autoencoder, parts.text_encoder)
        self._built: dict[str, Any] = {}  # building one from its YAML takes as long as many steps' arithmetic

    @classmethod
    def load(cls, path: str | Path, config: str | Path | None = None, weights: str = "ema") -> Pipeline:
        """From a run directory or checkpoint folder of ours, a diffusers folder, a CompVis-style file, or a hub id.

        config: for single files of other sizes than the published ones, a diffusers folder or a run of the same model.
        ConfigError when it cannot be read or is nothing to sample from.
        """
        parts = load_any(path, weights, config)
        if parts.denoiser is None or parts.text_encoder is None:
            raise ConfigError(
                f"{path} is an autoencoder: nothing to sample from. Give a run of module=latent_diffusion, or the "
                "folder or file of a whole pipeline."
            )
        return cls(parts.for_sampling())

    def load_adapter(self, path: str | Path, weight: float = 1.0, token: str | None = None) -> None:
        """Attaches a LoRA, a textual inversion or a hypernetwork: a file in anybody's layout, or a run of ours.

        weight: how much of it, 1 as trained; token: the word of an embedding whose file does not say it. Several can be
        attached, in any order. ConfigError when it cannot be read or belongs to another base; nothing is attached then.
        """
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"weight={weight!r}: must be a number; 1 is the adapter as it was trained.")
        for adapter in load_adapters(path, self.parts, weight, token):
            name = f"{path}" if f"{path}" not in self.adapters else f"{path} ({len(self.adapters)})"
            self.adapters[name] = adapter

    def unload_adapters(self) -> None:
        """Takes all adapters off: the base draws again what it drew before."""
        for adapter in self.adapters.values():
            adapter.detach()
        self.adapters.clear()

    @property
    def image_size(self) -> int:
        """Pixels a side of the training images. ConfigError where the checkpoint does not say it."""
        if not self.config.get("image_size"):
            raise ConfigError(f"{self.folder} does not say how large its pictures are: give height= and width=.")
        return self.config["image_size"]

    def to(self, device: str | torch.device) -> Pipeline:
        """Moves all modules; noise is drawn on the CPU wherever they are."""
        self.parts.to(device)
        return self

    def compile(self, how: Compile = "blocks") -> Pipeline:
        """Compiles the network by torch.compile, its blocks or the "whole": only the first pictures take longer.

        Adapters are attached before. On a GPU "graphs" also saves the launches of a step, for small batches.
        """
        compile_network(self.parts.network, how)
        return self

    def __call__(self, prompt: Texts, negative_prompt: Texts = "", **options: Any) -> list[Image.Image]:
        """Pictures; takes the options of `request`."""
        return [to_pil(image) for image in self.sample(prompt, negative_prompt, **options)]

    def sample(self, prompt: Texts, negative_prompt: Texts = "", **options: Any) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1]; takes the options of `request`."""
        return self.sampler.sample(self.request(prompt, negative_prompt, **options))

    def steps(self, prompt: Texts, negative_prompt: Texts = "", **options: Any) -> Iterator[Step]:
        """The sampler's steps: `pipe.decode(step.x0)` shows the jump to x0. Options as in `request`."""
        return self.sampler.steps(self.request(prompt, negative_prompt, **options))

    def decode(self, x0: Tensor, tiling: bool = False) -> Tensor:  # (B,C,h,w) standardised -> (B,3,H,W) in [-1, 1]
        return self.sampler.decode(x0, tiling)

    def request(
        self,
        prompt: Texts,
        negative_prompt: Texts = "",
        height: int | None = None,  # pixels; None: init_image's, or as trained
        width: int | None = None,
        num_steps: int | None = None,  # None: the run's own, else 30
        guidance: float | None = None,  # None: the run's own, else 7.5
        guidance_rescale: float | None = None,  # None: the run's own, else 0
        sampler: str | Path | Solver | Mapping[str, Any] | None = None,  # name, YAML or node of conf/sampler
        eta: float | None = None,
        seed: int | Sequence[int] = 0,  # one for all (they draw in turn), or one an image
        num_images: int = 1,  # per prompt
        init_image: Picture | Sequence[Picture] | None = None,  # PIL, path, (3,H,W) in [-1, 1]; one, or one a prompt
        strength: float | None = None,  # None: 0.8 with init_image alone, 1 with a mask
        mask: Picture | None = None,  # white is repainted, in a (1,H,W) tensor 1; of init_image's size
        clip_skip: int = 0,  # layers of the text encoder left out, counted as in diffusers
        chunked: bool = False,  # prompts longer than the text encoder's are read in pieces instead of cut
        prompt_weights: bool = False,  # (word:1.3), (word) and [word] weigh words
        tiling: bool = False,  # the autoencoder works in tiles
        guider: Guider | Mapping[str, Any] | None = None,  # or its node; usual: classifier-free
        spacing: Spacing | Mapping[str, Any] | None = None,  # from ldm.diffusion.grids; usual: the sampler's
    ) -> Request:
        """What `steps`, `sample` and the call itself draw. ConfigError for what cannot be drawn.

        What a run of ours was trained with (its config.yaml) is the default of num_steps, guidance, guidance_rescale,
        sampler with its eta and spacing, and guider; what is given here wins.
        """
        asked = {"num_steps": num_steps, "guidance": guidance, "guidance_rescale": guidance_rescale, "eta": eta}
        chosen = self.settings({**asked, "sampler": sampler, "grid": spacing, "guider": guider})
        prompts, negative = _texts("prompt", prompt), _texts("negative_prompt", negative_prompt)
        if isinstance(negative_prompt, str):
            negative = negative * len(prompts)
        for name, number in (
            ("height", height),
            ("width", width),
            ("num_steps", chosen["num_steps"]),
            ("num_images", num_images),
        ):
            if number is not None and not isinstance(number, Integral):
                raise ConfigError(f"{name}={number!r}: must be a whole number.")
        if num_images < 1:
            raise ConfigError(f"num_images={num_images}: must be at least 1.")
        image, painted = _pictures(init_image, mask, height, width, self.sampler.autoencoder.factor)
        if image is not None:
            height, width = image.shape[-2:]
            image = image.repeat_interleave(num_images, dim=0) if len(image) > 1 else image
        solver = self.solver(chosen["sampler"])
        if chosen["eta"] is not None:
            solver = (solver or self.solver("ddim")).with_eta(chosen["eta"])  # type: ignore[union-attr]
        text = Prompts(clip_skip, chunked, prompt_weights)
        prompts = [p for p in prompts for _ in range(num_images)]
        return Request(
            prompts=prompts,
            negative_prompts=[p for p in negative for _ in range(num_images)],
            height=self.image_size if height is None else height,
            width=self.image_size if width is None else width,
            num_steps=chosen["num_steps"],
            guidance=chosen["guidance"],
            seeds=_seeds(seed),
            solver=solver,
            spacing=self._of(chosen["grid"], "grid"),
            guider=self._complete(self._of(chosen["guider"], "guider"), text, prompts),
            text=text,
            init_image=image,
            mask=painted,
            strength=strength if strength is not None else 0.8 if image is not None and mask is None else 1.0,
            tiling=tiling,
        )

    def settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What is drawn with: `asked`, keys and groups as on the command line, with the run's own for what is not."""
        return sampling_settings(asked, self.config)

    def solver(self, sampler: str | Path | Solver | Mapping[str, Any] | None) -> Solver | None:
        """The named sampler as it is on this checkpoint; None: the model's own, where no file says another."""
        if isinstance(sampler, Solver):
            return sampler
        if sampler is not None and not isinstance(sampler, str | Path | Mapping):
            raise ConfigError(f"sampler must be a name or a YAML of conf/sampler, not {type(sampler).__name__}.")
        if isinstance(sampler, Path) or (isinstance(sampler, str) and Path(sampler).suffix):
            return solver_of(sampler, self.scheduler_config)  # a file may change between calls
        if (name := f"sampler {sampler or ''}") not in self._built:
            self._built[name] = solver_of(sampler, self.scheduler_config)
        return self._built[name]

    def _of(self, given: Any, group: str) -> Any:
        """The object of a node of `settings`, built once; objects as they are, None for an empty node."""
        if not isinstance(given, Mapping):
            return given
        if (name := f"{group} {given}") not in self._built:
            self._built[name] = build(given, group)
        return self._built[name]

    def save(self, path: str | Path, format: str = "ldm", dtype: str = "float32") -> None:
        """Writes the model as "ldm" (a checkpoint folder), "diffusers" (a folder) or "compvis" (.safetensors, .ckpt).

        LoRAs are worked into its weights. ConfigError for what the format cannot carry, and for a path that exists.
        """
        save_any(self.parts, path, format, dtype)

    def _complete(self, guider: Guider, text: Prompts, prompts: list[str]) -> Guider:
        """Autoguidance gets the second model that it names."""
        if not isinstance(guider, Autoguidance) or not guider.checkpoint or guider.weak is not None:
            return guider
        weak = Pipeline.load(guider.checkpoint).to(self.sampler.device).sampler
        ours, theirs = self.sampler.autoencoder.latents, weak.autoencoder.latents
        if not (torch.equal(ours.mean, theirs.mean) and torch.equal(ours.scale, theirs.scale)):
            raise ConfigError(
                f"guider.checkpoint={guider.checkpoint} speaks another autoencoder's latents: give a model trained on "
                "the same."
            )
        return guider.with_denoiser(weak.denoiser, text.encode(weak.text_encoder, prompts)[0])


def _texts(name: str, given: Texts) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"{name} must be a text or a list of texts, not {type(given).__name__}.")
    try:
        return [checked(text) for text in texts]
    except NotText as error:
        raise ConfigError(f"{name} is {error}.") from None


def _seeds(given: Any) -> list[int]:
    seeds = list(given) if isinstance(given, list | tuple | range) else [given]
    if not all(isinstance(s, Integral) and -(2**63) <= int(s) < 2**64 for s in seeds):  # what torch.Generator takes
        raise ConfigError(f"seed={given!r}: must be a whole number below 2^64, or a list of them, one an image.")
    return [int(s) for s in seeds]


def _pictures(
    init_image: Picture | Sequence[Picture] | None,
    mask: Picture | None,
    height: int | None,
    width: int | None,
    factor: int,
) -> tuple[Tensor | None, Tensor | None]:
    """(B,3,H,W) in [-1, 1] and (1,1,H,W), 1 where repainted, in the wanted size or one that the factor divides."""
    if init_image is None:
        if mask is not None:
            raise ConfigError("mask= belongs to a picture: give init_image= too.")
        return None, None
    given: Sequence[Any] = init_image if isinstance(init_image, list | tuple) else [init_image]
    if not given:
        raise ConfigError("init_image=[] holds no picture: give one, or one a prompt.")
    pictures = [_opened(p, "init_image", 3) for p in given]
    painted = None if mask is None else _opened(mask, "mask", 1)
    tall, wide = _size(pictures[0])
    if painted is not None and _size(painted) != (tall, wide):
        sizes = [f"{_size(p)[1]}x{_size(p)[0]}" for p in (painted, pictures[0])]
        raise ConfigError(f"the mask has {sizes[0]} pixels, the picture {sizes[1]}: make them the same size.")
    size = (
        max(factor, tall // factor * factor) if height is None else height,
        max(factor, wide // factor * factor) if width is None else width,
    )
    if min(size) < 1:
        raise ConfigError(f"height={size[0]}, width={size[1]}: must be at least {factor}.")
    image = torch.cat([_scaled(p, size) for p in pictures])
    if painted is None:
        return image, None
    half = 0.5 if isinstance(painted, Tensor) else 0.0  # pictures were scaled to [-1, 1]
    white = _scaled(painted, size) >= half
    if not white.any():
        warnings.warn(
            "the mask has nothing white, so nothing is repainted: paint in white what shall be.", stacklevel=4
        )
    return image, white.to(image)


def _opened(picture: Picture, name: str, channels: int) -> Image.Image | Tensor:
    """Upright, in colours and over white as the pictures of a data set are read; a mask in grey and over black.

    So white strokes on a transparent layer are white where they cover it, whatever colour the layer hides.
    """
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or len(picture) != channels:
            raise ConfigError(f"{name} as a tensor must be ({channels}, height, width), not {tuple(picture.shape)}.")
        if channels == 3 and not (picture.is_floating_point() and bool(picture.isfinite().all())):
            raise ConfigError(f"{name} as a tensor must hold finite numbers in [-1, 1], not {picture.dtype} or NaN.")
        return picture
    if isinstance(picture, Image.Image):
        upright = ImageOps.exif_transpose(picture)
        return to_rgb(upright) if channels == 3 else to_rgb(upright, behind=0).convert("L")
    if not isinstance(picture, str | Path):
        raise ConfigError(f"{name} must be a picture, a path or a tensor, not {type(picture).__name__}.")
    try:
        with Image.open(picture) as file:
            file.load()
            return _opened(file, name, channels)
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # whatever a format's parser meets
        raise ConfigError(f"{name}={picture}: not a picture that can be read ({error}).") from error


def _size(picture: Image.Image | Tensor) -> tuple[int, int]:  # height, width
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else tuple(picture.shape[-2:])  # type: ignore[return-value]


def _scaled(picture: Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """(1,C,*size) in [-1, 1]; pictures are scaled by Lanczos, tensors must have the size."""
    if isinstance(picture, Tensor):
        if _size(picture) != size:
            raise ConfigError(
                f"init_image and mask as tensors must be {size[0]}x{size[1]}, not {tuple(picture.shape)}."
            )
        return picture[None]
    if _size(picture) != size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return from_pil(picture)[None]
