"""From prompts and seeds to steps to pictures. No files: callbacks, metrics, tasks and Pipeline all come here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.autoencoders.kl import Autoencoder
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import Spacing
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.own import own_solver
from ldm.diffusion.samplers.solver import Solver, Step
from ldm.errors import ConfigError
from ldm.pictures import Frame
from ldm.text.encoder import TextEncoder

DECODED_AT_ONCE = 2**22  # pixels: larger batches are decoded in slices, so that memory does not grow with them


class Noise:
    """Standard normal draws on the CPU in float32: one generator for all images, or one for each."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        if len(self.generators) == 1:
            return torch.randn(tuple(shape), generator=self.generators[0])
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in self.generators])

    def __call__(self, like: Tensor) -> Tensor:
        return self.draw(like.shape).to(like)


@dataclass
class Request:
    """What is to be drawn; one prompt an image. Sizes are in pixels.

    seeds: one for all images (they draw in turn from one generator), or one an image.
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
    guider: ClassifierFree = field(default_factory=ClassifierFree)


class Sampler:
    """A denoiser between a text encoder and an autoencoder."""

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder, text_encoder: TextEncoder):
        self.denoiser, self.autoencoder, self.text_encoder = denoiser, autoencoder, text_encoder

    @torch.no_grad()
    def steps(self, request: Request) -> Iterator[Step]:
        """The sampler's steps on standardised latents; `step.x0` is the jump."""
        n = len(request.prompts)
        _check(request, self.autoencoder.factor)
        device = next(self.autoencoder.parameters()).device
        noise = Noise(request.seeds)
        solver = request.solver or own_solver(self.denoiser.scheduler)
        levels = solver.levels(self.denoiser.scheduler, request.num_steps, request.spacing)
        cond = self.text_encoder.encode(list(request.prompts)).to(device)
        reference: Condition | None = None
        if request.guidance > 1 and (cond.context is not None or cond.pooled is not None):
            reference = self.text_encoder.encode(list(request.negative_prompts or [""] * n)).to(device)
        denoise = request.guider(self.denoiser, cond, reference, request.guidance)
        channels, factor = len(self.autoencoder.latents.mean), self.autoencoder.factor
        shape = (n, channels, request.height // factor, request.width // factor)
        x = levels.start * noise.draw(shape).to(device)
        yield from solver(denoise, levels, x, noise)

    def sample(self, request: Request) -> Tensor:
        """(B,3,H,W) float32 in [-1, 1]."""
        for step in self.steps(request):
            last = step.x_next
        return self.decode(last)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:  # (B,C,h,w) standardised -> (B,3,H,W) in [-1, 1]
        """Pictures of standardised latents, decoded a slice at a time."""
        raw = self.autoencoder.latents.restore(x0)
        pixels = raw.shape[-1] * raw.shape[-2] * self.autoencoder.factor**2
        slices = raw.split(max(1, DECODED_AT_ONCE // pixels))
        return torch.cat([self.autoencoder.decode(s).float().clamp(-1, 1) for s in slices])

    def frames(self, steps: Sequence[Step], numbers: Sequence[int]) -> list[Frame]:
        """Chosen steps (1 is the first) decoded for a film strip."""
        frames = []
        for number in numbers:
            step = steps[number - 1]
            frames.append(Frame(number, float(step.level.ratio), self.decode(step.x_t), self.decode(step.x0)))
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


def _check(request: Request, factor: int) -> None:
    n = len(request.prompts)
    if n == 0:
        raise ConfigError('there is no prompt: give prompt="..." or prompts=FILE.')
    for name, size in (("height", request.height), ("width", request.width)):
        if size % factor or size < factor:
            below, above = max(factor, size // factor * factor), (size // factor + 1) * factor
            raise ConfigError(f"{name}={size} is not divisible by the autoencoder's {factor}: use {below} or {above}.")
    if len(request.seeds) not in (1, n):
        raise ConfigError(f"{len(request.seeds)} seeds for {n} images: give one seed, or one an image.")
    if request.negative_prompts and len(request.negative_prompts) != n:
        raise ConfigError(f"{len(request.negative_prompts)} negative prompts for {n} images: give one an image.")
