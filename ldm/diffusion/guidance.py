"""Classifier-free guidance (Ho and Salimans 2022) as a wrapper around the denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import Level
from ldm.errors import ConfigError


class ClassifierFree:
    """reference + scale (positive - reference) on the network's output, both conditions in one batch.

    rescale: share of the result brought back to the positive output's standard deviation over C, H, W of each
        sample (Lin et al. 2024, Section 3.4); 0 is off.
    interval: guide only while sigma/alpha lies inside (low, high) (Kynkäänniemi et al. 2024); None: always.
    """

    def __init__(self, rescale: float = 0.0, interval: tuple[float, float] | None = None):
        if not 0 <= rescale <= 1:
            raise ConfigError(f"guidance_rescale={rescale} is outside [0, 1]: published models use 0.7, 0 is off.")
        self.rescale = rescale
        self.interval = interval

    def __call__(self, denoiser: Denoiser, cond: Condition, reference: Condition | None, scale: float) -> Guided:
        """A guided denoiser for one sampling run; `reference` is the empty or the negative prompt."""
        return Guided(denoiser, cond, reference, scale, self.rescale, self.interval)


class Guided:
    """denoise(x_t, level) -> x0 for one sampling run."""

    def __init__(
        self,
        denoiser: Denoiser,
        cond: Condition,
        reference: Condition | None,
        scale: float,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ):
        self.denoiser, self.cond, self.scale = denoiser, cond, scale
        self.rescale, self.interval = rescale, interval
        # The reference first, as in the published pipelines.
        self.both = Condition.cat([reference, cond]) if reference is not None and scale > 1 else None

    def __call__(self, x_t: Tensor, level: Level) -> Tensor:  # (B,C,H,W) -> (B,C,H,W)
        if self.both is None or not self._inside(level):
            return self.denoiser(x_t, level, self.cond)
        reference, positive = self.denoiser.output(torch.cat([x_t, x_t]), level, self.both).chunk(2)
        output = reference + self.scale * (positive - reference)
        if self.rescale > 0:
            dims = tuple(range(1, x_t.ndim))
            ratio = positive.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True)
            output = output * (self.rescale * ratio + 1 - self.rescale)
        return self.denoiser.x0(x_t, output, level)

    def _inside(self, level: Level) -> bool:
        return self.interval is None or bool(self.interval[0] <= level.ratio <= self.interval[1])
