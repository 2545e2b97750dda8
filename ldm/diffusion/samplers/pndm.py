"""PNDM: linear multistep with an equal-steps formula, begun by a predictor-corrector step or by Runge-Kutta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ldm.diffusion.levels import Level, Levels, weighted_sum
from ldm.diffusion.samplers.solver import Denoise, Noise, Step
from ldm.errors import ConfigError

# Adams-Bashforth on equal steps, newest first.
_ADAMS = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
# What is averaged over calls: slopes (eps on tables), or v, as diffusers does with models that predict it.
Mixed = Literal["slope", "v"]


def pndm(denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, mixed: Mixed = "slope") -> Iterator[Step]:
    """Liu et al. 2022 as Stable Diffusion samples with it (PLMS): the second level is visited twice.

    Calls 1 and 2 make the first step, call i >= 3 steps from entry i of the levels to entry i + 1, also where they are
    cut for image to image, as published pipelines do.
    """
    outputs: list[Tensor] = []  # newest first
    start = (levels[0], x)
    for call, (level, after) in enumerate(pairwise(levels), start=1):
        x0 = denoise(x, level)
        output = _output(levels, x, x0, level, mixed)
        if call == 2:  # the first step again, with the mean of both its ends
            x_next = _move(levels, start[1], start[0], level, (output + outputs[0]) / 2, mixed)
        else:
            outputs = [output, *outputs][:4]
            x_next = _move(levels, x, level, after, _adams(outputs), mixed)
        yield (step := Step(level, after, x, x0, x_next))
        x = step.x_next


def pndm_runge_kutta(
    denoise: Denoise, levels: Levels, x: Tensor, noise: Noise, mixed: Mixed = "slope"
) -> Iterator[Step]:
    """Liu et al. 2022: the first three steps by the classical Runge-Kutta method, four calls each.

    ConfigError where sigma/alpha starts so high that these steps diverge (measured: 200 times too wide on cosine).
    """
    if (top := levels.position(levels[0])) > 1000:
        raise ConfigError(
            f"sampler=pndm_runge_kutta diverges on this scheduler, whose sigma/alpha starts at {top:.0f}: use "
            "sampler=pndm, or scheduler=scaled_linear without zero terminal SNR."
        )
    outputs: list[Tensor] = []
    for number, (level, after) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        output = _output(levels, x, x0, level, mixed)
        outputs = [output, *outputs][:4]
        mean = _adams(outputs)
        if number < 3 and after.sigma > 0:
            half = levels.scheduler.level((level.t + after.t) / 2)
            mean = output / 6
            for to, weight in ((half, 1 / 3), (half, 1 / 3), (after, 1 / 6)):
                x_stage = _move(levels, x, level, to, output, mixed)
                output = _output(levels, x_stage, denoise(x_stage, to), to, mixed)
                mean = mean + weight * output
        yield (step := Step(level, after, x, x0, _move(levels, x, level, after, mean, mixed)))
        x = step.x_next


def _adams(outputs: Sequence[Tensor]) -> Tensor:
    return weighted_sum(*zip(_ADAMS[len(outputs) - 1], outputs, strict=True))


def _output(levels: Levels, x: Tensor, x0: Tensor, level: Level, mixed: Mixed) -> Tensor:
    if mixed == "v":
        return weighted_sum((level.alpha / level.sigma, x), (-1 / level.sigma, x0))
    return levels.slope(level, x, x0)


def _move(levels: Levels, x: Tensor, level: Level, after: Level, output: Tensor, mixed: Mixed) -> Tensor:
    h = levels.position(after) - levels.position(level)
    slope = [(h * level.alpha, output), (h * level.sigma, x)] if mixed == "v" else [(h, output)]
    return levels.along(level, after, x, slope)
