"""From prompts and seeds to steps to pictures. No files: callbacks, metrics, tasks and Pipeline all come here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoders.kl import Autoencoder
from ldm.autoencoders.tiling import OVERLAP, TILE, tiled
from ldm.devices import beside, on_device
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import Spacing
from ldm.diffusion.guidance import ClassifierFree, Guider
from ldm.diffusion.levels import Levels
from ldm.diffusion.samplers.own import own_solver
from ldm.diffusion.samplers.solver import Solver, Step
from ldm.errors import ConfigError, NotFinite
from ldm.models.inputs import inpainting_channels
from ldm.pictures import Frame
from ldm.text.encoder import TextEncoder
from ldm.text.prompts import Prompts

DECODED_AT_ONCE = 2**22  # pixels: larger batches are decoded in slices, so that memory does not grow with them


class Noise:
    """Standard normal draws on the CPU in float32: one generator for all images, or one for each."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        if len(self.generators) == 1:
            return torch.randn(tuple(shape), generator=self.generators[0])
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in self.generators[: shape[0]]])

    def __call__(self, like: Tensor) -> Tensor:
        return beside(self.draw(like.shape), like)


@dataclass
class Request:
    """What is to be drawn; one prompt an image. Sizes are in pixels.

    seeds: one for all images (they draw in turn from one generator), or one an image.
    init_image: (1 or B, 3, height, width) in [-1, 1]: where to start from (image to image), or what is repainted.
    mask: (1 or B, 1, height, width), above 0.5 where init_image is repainted.
    strength: share of the steps that is walked, in (0, 1]: what is left of init_image falls with it.
    tiling: the autoencoder works tile by tile, for pictures larger than memory.
    """

    prompts: Sequence[str]
    height: int
    width: int
    negative_prompts: Sequence[str] = ()
    num_steps: int = 30
    guidance: float = 7.5
    seeds: Sequence[int] = (0,)
    solver: Solver | None = None
    spacing: Spacing | None = None
    guider: Guider = field(default_factory=ClassifierFree)
    text: Prompts = field(default_factory=Prompts)
    init_image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0
    tiling: bool = False

    def rows(self, numbers: Sequence[int]) -> Request:
        """The request for some of its pictures, which come out as they would beside the others: one seed an image."""
        n = len(self.prompts)
        assert len(self.seeds) == n, "one generator for all images draws them in turn"

        def some(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in numbers]

        def pictures(given: Tensor | None) -> Tensor | None:
            return given if given is None or len(given) != n else given[list(numbers)]

        negative = some(self.negative_prompts) if self.negative_prompts else ()
        images, masks = pictures(self.init_image), pictures(self.mask)
        return replace(
            self,
            prompts=some(self.prompts),
            negative_prompts=negative,
            seeds=some(self.seeds),
            init_image=images,
            mask=masks,
        )


class Sampler:
    """A denoiser between a text encoder and an autoencoder."""

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder, text_encoder: TextEncoder):
        self.denoiser, self.autoencoder, self.text_encoder = denoiser, autoencoder, text_encoder

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    @torch.no_grad()
    def steps(self, request: Request) -> Iterator[Step]:
        """The sampler's steps on standardised latents; `step.x0` is the jump.

        Noise is drawn as diffusers' pipelines draw it: the posterior of init_image, x_1, the posterior of what the mask
        leaves, then the sampler's own.
        """
        n = len(request.prompts)
        _check(request, self.autoencoder.factor)
        noise = Noise(request.seeds)
        solver = request.solver or own_solver(self.denoiser.scheduler)
        levels = _walked(solver.levels(self.denoiser.scheduler, request.num_steps, request.spacing), request)
        negative = list(request.negative_prompts or [""] * n) if request.guidance > 1 else None
        cond, reference = request.text.encode(self.text_encoder, list(request.prompts), negative)
        cond, reference = cond.to(self.device), None if reference is None else reference.to(self.device)

        channels, factor = len(self.autoencoder.latents.mean), self.autoencoder.factor
        shape = (n, channels, request.height // factor, request.width // factor)
        sees_mask = self._sees_mask(channels, request)
        z, image, mask = None, request.init_image, request.mask
        if image is not None and (mask is None or not sees_mask or request.strength < 1):
            each = mask is None and len(request.seeds) > 1  # then one picture gets a posterior sample of every seed
            z = self._encode(image.expand(n, -1, -1, -1) if each else image, noise, request.tiling)
        eps = on_device(noise.draw(shape), self.device)
        kept = None
        if image is not None and mask is not None:
            masked = self._encode(image * (mask < 0.5), noise, request.tiling)  # drawn even where it is not looked at
            kept = F.interpolate((mask >= 0.5).to(masked), size=shape[2:], mode="nearest")
            if sees_mask:
                concat = torch.cat([kept.expand(n, -1, -1, -1), masked.expand(n, -1, -1, -1)], dim=1)
                cond, kept = replace(cond, concat=concat), None
        if z is None or (mask is not None and request.strength == 1):
            x = levels.start * eps
        else:
            x = levels[0].noised(z, eps)
        denoise = request.guider(self.denoiser, cond, reference, request.guidance)
        for left, step in zip(range(len(levels) - 2, -1, -1), solver(denoise, levels, x, noise), strict=True):
            if z is not None and kept is not None:  # an ordinary model repaints: outside the mask the image is put back
                outside = step.next.noised(z, eps) if left else z
                step.x_next = kept * step.x_next + (1 - kept) * outside
            yield step

    def sample(self, request: Request) -> Tensor:
        """(B,3,H,W) float32 in [-1, 1]."""
        for step in self.steps(request):
            last = step.x_next
        return self.decode(last, request.tiling)

    @torch.no_grad()
    def decode(self, x0: Tensor, tiling: bool = False) -> Tensor:  # (B,C,h,w) standardised -> (B,3,H,W) in [-1, 1]
        """Pictures of standardised latents, a slice at a time; in tiles where asked for, or when memory runs out."""
        raw, factor = self.autoencoder.latents.restore(x0), self.autoencoder.factor
        slices = raw.split(max(1, DECODED_AT_ONCE // (raw.shape[-1] * raw.shape[-2] * factor**2)))
        try:
            if not tiling:
                return torch.cat([self._pixels(s) for s in slices])
        except torch.OutOfMemoryError:
            warnings.warn(
                "out of memory while decoding: decoding in tiles, which changes the picture slightly "
                "(tiling=true says so from the start).",
                stacklevel=2,
            )
        return torch.cat([tiled(self._pixels, s, Fraction(factor), TILE, OVERLAP) for s in raw.split(1)])

    def _pixels(self, z: Tensor) -> Tensor:
        pixels = self.autoencoder.decode(z).float()
        if not bool(pixels.isfinite().all()):
            raise NotFinite(f"the picture is not finite (NaN or infinite): {self._reason(z)}")
        return pixels.clamp(-1, 1)

    def _reason(self, z: Tensor) -> str:
        """Which part is to blame for pixels that are not finite; z: the raw latents that were decoded."""
        network = {"the network": self.denoiser.model} if isinstance(self.denoiser.model, nn.Module) else {}
        parts = {"the text encoder": self.text_encoder, **network, "the autoencoder": self.autoencoder}
        for called, module in parts.items():
            wrong = [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]
            if wrong:
                others = f" and {len(wrong) - 1} more of its tensors" if len(wrong) > 1 else ""
                return (
                    f"{called}'s weights hold NaN or infinities, in {wrong[0]}{others}. The file is damaged, or its "
                    "training diverged: take another version or step of the checkpoint."
                )
        if bool(z.isfinite().all()):
            return "the autoencoder's numbers grew beyond what float32 holds, on finite weights: take another one."
        return (
            "the sampler's latents grew beyond what float32 holds, and the weights are finite. Use a lower guidance=, "
            "more num_steps= or another sampler=, and take off adapters of high weight."
        )

    def _encode(self, image: Tensor, noise: Noise, tiling: bool) -> Tensor:  # (B,3,H,W) -> (B,C,h,w) standardised
        factor = self.autoencoder.factor
        image = image.to(self.device)
        if tiling:
            moments = tiled(
                lambda x: self.autoencoder.encode(x).moments(),
                image,
                Fraction(1, factor),
                TILE * factor,
                OVERLAP * factor,
            )
            posterior = self.autoencoder.posterior(moments)
        else:
            posterior = self.autoencoder.encode(image)
        return self.autoencoder.latents.standardise(posterior.sample(noise(posterior.mean)))

    def _sees_mask(self, channels: int, request: Request) -> bool:
        """Whether the network has inputs for mask and masked latent. ConfigError where they do not fit the request."""
        extra = getattr(self.denoiser.model, "in_channels", channels) - channels
        fitting = inpainting_channels(channels) - channels
        if extra not in (0, fitting):
            raise ConfigError(
                f"the network has {extra} input channels beside the latent's {channels}: models with none, or with "
                f"{fitting} (a mask and a masked latent), can be sampled."
            )
        if extra and request.mask is None:
            raise ConfigError(
                "this is an inpainting model: give init_image= and mask=, an all-white mask for a new picture."
            )
        return extra > 0

    def frames(self, steps: Sequence[Step], numbers: Sequence[int], tiling: bool = False) -> list[Frame]:
        """Chosen steps (1 is the first) decoded for a film strip."""
        frames = []
        for number in numbers:
            step = steps[number - 1]
            current, jump = (self.decode(x, tiling) for x in (step.x_t, step.x0))
            frames.append(Frame(number, float(step.level.ratio), current, jump))
        return frames

    def previews(self, steps: Sequence[Step]) -> list[Frame]:
        """Every step as a small linear picture: what a full decode costs is not spent."""
        frames = []
        for number, step in enumerate(steps, start=1):
            show = self.autoencoder.latents.preview
            frames.append(Frame(number, float(step.level.ratio), show(step.x_t), show(step.x0)))
        return frames


def chosen_steps(num_steps: int, wanted: Sequence[int] = (*range(1, 11), 15, 20)) -> list[int]:
    """The wanted step numbers that a run has, and its last one."""
    return sorted({n for n in wanted if n <= num_steps} | {num_steps})


def _walked(levels: Levels, request: Request) -> Levels:
    """The last int(num_steps strength) steps (Meng et al. 2022)."""
    walked = int(request.num_steps * request.strength)
    if walked == 0:
        raise ConfigError(
            f"strength={request.strength} of num_steps={request.num_steps} leaves no step: use "
            f"strength={math.ceil(100 / request.num_steps) / 100:g} or more, or more steps."
        )
    return levels[request.num_steps - walked :]


def _check(request: Request, factor: int) -> None:
    n = len(request.prompts)
    if n == 0:
        raise ConfigError('there is no prompt: give prompt="..." or prompts=FILE.')
    for name, size in (("height", request.height), ("width", request.width)):
        if size % factor or size < factor:
            fitting = sorted({max(factor, k * factor) for k in (size // factor, size // factor + 1)})
            raise ConfigError(
                f"{name}={size} is not divisible by the autoencoder's {factor}: use {' or '.join(map(str, fitting))}."
            )
    if len(request.seeds) not in (1, n):
        raise ConfigError(f"{len(request.seeds)} seeds for {n} images: give one seed, or one an image.")
    if request.negative_prompts and len(request.negative_prompts) != n:
        raise ConfigError(f"{len(request.negative_prompts)} negative prompts for {n} images: give one an image.")
    if not 0 < request.strength <= 1:
        raise ConfigError(f"strength={request.strength} is outside (0, 1]: 0.8 is usual, 1 forgets the image.")
    if request.init_image is None and (request.mask is not None or request.strength < 1):
        what = "mask=" if request.mask is not None else f"strength={request.strength}"
        raise ConfigError(f"{what} belongs to a picture: give init_image= too.")
    for name, picture in (("init_image", request.init_image), ("mask", request.mask)):
        if picture is not None and (
            picture.shape[-2:] != (request.height, request.width) or len(picture) not in (1, n)
        ):
            raise ConfigError(
                f"{name} is {len(picture)} of {picture.shape[-2]}x{picture.shape[-1]} pixels, the request {n} of "
                f"{request.height}x{request.width} (height x width): give one for all or one an image, of that size."
            )
