"""Guidance: the denoiser with a stronger pull of the caption, made anew for every sampling run."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import Level
from ldm.diffusion.samplers.solver import Denoise
from ldm.errors import ConfigError


class Guider(ABC):
    """guider(denoiser, cond, reference, scale) -> denoise(x_t, level) -> x0, for one sampling run.

    At a scale of at most 1 and outside the interval nothing is guided: the caption alone, one call of the network.

    rescale: share of the result brought back to the unguided one's standard deviation over C, H, W of each sample
        (Lin et al. 2024, Section 3.4); 0 is off.
    interval: guide only while sigma/alpha lies inside [low, high] (Kynkäänniemi et al. 2024); None: always.
    """

    def __init__(self, rescale: float = 0.0, interval: tuple[float, float] | None = None):
        if not 0 <= rescale <= 1:
            raise ConfigError(f"guidance_rescale={rescale} is outside [0, 1]: published models use 0.7, 0 is off.")
        if interval is not None and not 0 <= interval[0] <= interval[1]:
            raise ConfigError(
                f"guider.interval={list(interval)} holds no sigma/alpha: give the lower end first, such as [0.3,5]."
            )
        self.rescale = rescale
        self.interval = interval

    def __call__(self, denoiser: Denoiser, cond: Condition, reference: Condition | None, scale: float) -> Denoise:
        """`reference` is the empty or the negative prompt; None: there is none, as in an unconditional model."""
        guided = self.guided(denoiser, cond, reference, scale) if scale > 1 else None

        def denoise(x_t: Tensor, level: Level) -> Tensor:
            if guided is None or not self._inside(level):
                return denoiser(x_t, level, cond)
            return guided(x_t, level)

        return denoise

    @abstractmethod
    def guided(self, denoiser: Denoiser, cond: Condition, reference: Condition | None, scale: float) -> Denoise | None:
        """The guided x0 at a scale above 1; None where there is nothing to guide with. State of a run lives inside."""

    def rescaled(self, guided: Tensor, positive: Tensor) -> Tensor:  # (B,C,H,W), (B,C,H,W) -> (B,C,H,W)
        if self.rescale == 0:
            return guided
        dims = tuple(range(1, guided.ndim))
        ratio = positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)

    def _inside(self, level: Level) -> bool:
        return self.interval is None or bool(self.interval[0] <= level.ratio <= self.interval[1])


class ClassifierFree(Guider):
    """reference + scale (positive - reference) on the network's output (Ho and Salimans 2022).

    batched: both conditions as one batch; False: one after the other, at half the batch: less memory, more time.
    """

    def __init__(self, rescale: float = 0.0, interval: tuple[float, float] | None = None, batched: bool = True):
        super().__init__(rescale, interval)
        self.batched = batched

    def guided(self, denoiser: Denoiser, cond: Condition, reference: Condition | None, scale: float) -> Denoise | None:
        if reference is None:
            return None
        outputs = both_outputs(denoiser, cond, reference, self.batched)

        def denoise(x_t: Tensor, level: Level) -> Tensor:
            negative, positive = outputs(x_t, level)
            output = torch.lerp(negative, positive, scale)
            return denoiser.x0(x_t, self.rescaled(output, positive), level)

        return denoise


class AdaptiveProjected(Guider):
    """APG: of the difference of the two x0, what is parallel to the positive one oversaturates and is held back.

    Sadat et al. 2024, Algorithm 1: x0 = positive + (scale - 1) update, with
        average <- positive - reference + momentum average        (over the calls of one run)
        average made no longer than norm_threshold                (norm over C, H, W of each sample)
        update = orthogonal part + eta parallel part              (with respect to the positive x0)
    With eta 1, momentum 0 and no threshold it is classifier-free guidance. The defaults are the paper's for Stable
    Diffusion XL (4x128x128 latents): smaller latents have shorter differences and want a smaller threshold.
    """

    def __init__(
        self,
        eta: float = 0.0,  # share of the parallel part that is kept
        momentum: float = -0.5,  # in (-1, 1); negative: away from where earlier steps went
        norm_threshold: float | None = 15.0,  # None: any length
        rescale: float = 0.0,  # works on x0 here
        interval: tuple[float, float] | None = None,
        batched: bool = True,
    ):
        super().__init__(rescale, interval)
        if not -1 < momentum < 1:
            raise ConfigError(
                f"guider.momentum={momentum} sums differences without end: choose one in (-1, 1), such as -0.5."
            )
        if norm_threshold is not None and norm_threshold <= 0:
            raise ConfigError(f"guider.norm_threshold={norm_threshold} leaves no guidance: use null for no threshold.")
        self.eta, self.momentum, self.norm_threshold, self.batched = eta, momentum, norm_threshold, batched

    def guided(self, denoiser: Denoiser, cond: Condition, reference: Condition | None, scale: float) -> Denoise | None:
        if reference is None:
            return None
        outputs = both_outputs(denoiser, cond, reference, self.batched)
        average: Tensor | float = 0.0

        def denoise(x_t: Tensor, level: Level) -> Tensor:
            nonlocal average
            negative, positive = (denoiser.x0(x_t, output, level) for output in outputs(x_t, level))
            average = positive - negative + self.momentum * average
            update = average
            if self.norm_threshold is not None:
                update = update * (self.norm_threshold / _norm(update)).clamp(max=1)
            update = update - (1 - self.eta) * _parallel(update, positive)
            return self.rescaled(positive + (scale - 1) * update, positive)

        return denoise


class Autoguidance(Guider):
    """weak + scale (strong - weak) on x0: a model guided by a smaller or less trained one under the same caption.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself". The caption alone is used, no empty
    and no negative prompt: an unconditional model can be guided too. A guider reads no files: whoever does loads
    `checkpoint` and hands the second model over by `with_denoiser`.
    """

    def __init__(
        self,
        checkpoint: str | None = None,  # run or checkpoint folder of the second model
        rescale: float = 0.0,  # works on x0 here
        interval: tuple[float, float] | None = None,
    ):
        super().__init__(rescale, interval)
        self.checkpoint = checkpoint
        self.weak: Denoiser | None = None
        self.weak_cond: Condition | None = None

    def with_denoiser(self, weak: Denoiser, cond: Condition | None = None) -> Autoguidance:
        """The same guider with its second model.

        cond: the captions as that model's own text encoder states them; None: both models share one text encoder.
        """
        guider = copy.copy(self)
        guider.weak, guider.weak_cond = weak, cond
        return guider

    def guided(self, denoiser: Denoiser, cond: Condition, reference: Condition | None, scale: float) -> Denoise | None:
        if self.weak is None:
            raise ConfigError(
                "guider=autoguidance has no second model: name a smaller or less trained one, guider.checkpoint=PATH."
            )
        weak = self.weak
        _check_same_noise(denoiser, weak)
        weak_cond = cond if self.weak_cond is None else replace(self.weak_cond, concat=cond.concat)

        def denoise(x_t: Tensor, level: Level) -> Tensor:
            positive, negative = denoiser(x_t, level, cond), weak(x_t, level, weak_cond)
            return self.rescaled(negative + scale * (positive - negative), positive)

        return denoise


def both_outputs(
    denoiser: Denoiser, cond: Condition, reference: Condition, batched: bool
) -> Callable[[Tensor, Level], tuple[Tensor, ...]]:
    """(x_t, level) -> the network's outputs under `reference` and under `cond`; `concat` stands in both."""
    reference = replace(reference, concat=cond.concat)
    # The reference first, as in the published pipelines.
    if not batched:
        return lambda x_t, level: (denoiser.output(x_t, level, reference), denoiser.output(x_t, level, cond))
    both = Condition.cat([reference, cond])
    return lambda x_t, level: denoiser.output(torch.cat([x_t, x_t]), level, both).chunk(2)


def _norm(x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,1,1,1)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def _parallel(x: Tensor, to: Tensor) -> Tensor:  # (B,C,H,W), (B,C,H,W) -> (B,C,H,W)
    direction = to / _norm(to).clamp(min=1e-12)
    return (x * direction).sum(dim=tuple(range(1, x.ndim)), keepdim=True) * direction


def _check_same_noise(denoiser: Denoiser, weak: Denoiser) -> None:
    """Both models must mean the same noise by the same level, or the second is asked about times it never saw."""
    if any(denoiser.scheduler.level(t) != weak.scheduler.level(t) for t in (0.25, 0.5, 1.0)):
        names = [type(d.scheduler).__name__ for d in (denoiser, weak)]
        raise ConfigError(
            f"guider.checkpoint: the second model was trained on another noise schedule ({names[1]}) than the first "
            f"({names[0]}): give one that was trained with the same scheduler=."
        )
