"""Random masks for learning to repaint: boxes, strokes, or the whole picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.errors import ConfigError
from ldm.training.randomness import generator


class RandomMasks:
    """One mask a sample, a function of (seed, purpose, step, position) like all randomness of training.

    whole: share of samples where everything is repainted, so that the model can still draw without a picture.
    strokes: share of the rest that gets thick random lines (Suvorov et al. 2022); the others get boxes.
    """

    def __init__(self, whole: float = 0.25, strokes: float = 0.5, most: int = 4):
        if not (0 <= whole <= 1 and 0 <= strokes <= 1 and most >= 1):
            raise ConfigError(
                f"masking.whole={whole} and masking.strokes={strokes} are shares within [0, 1], and most={most} shapes "
                "is at least 1: the defaults are 0.25, 0.5 and 4."
            )
        self.whole, self.strokes, self.most = whole, strokes, most

    def __call__(
        self, height: int, width: int, seed: int, purpose: str, step: int, positions: Sequence[int]
    ) -> Tensor:  # -> (B,1,H,W), 1 is repainted
        return torch.stack([self._one(height, width, generator(seed, purpose, step, p)) for p in positions])

    def _one(self, height: int, width: int, draws: torch.Generator) -> Tensor:
        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=draws).item()

        if uniform(0, 1) < self.whole:
            return torch.ones(1, height, width)
        mask = Image.new("L", (width, height), 0)
        pen = ImageDraw.Draw(mask)
        shape = self._stroke if uniform(0, 1) < self.strokes else self._box
        for _ in range(1 + int(uniform(0, self.most))):
            shape(pen, height, width, uniform)
        return torch.from_numpy(np.array(mask)).float()[None] / 255

    @staticmethod
    def _box(pen: ImageDraw.ImageDraw, height: int, width: int, uniform) -> None:
        tall, wide = uniform(0.1, 0.6) * height, uniform(0.1, 0.6) * width
        top, left = uniform(0, height - tall), uniform(0, width - wide)
        pen.rectangle((left, top, left + wide, top + tall), fill=255)

    @staticmethod
    def _stroke(pen: ImageDraw.ImageDraw, height: int, width: int, uniform) -> None:
        """A walk of a few long steps that turns a little at each, with round joints."""
        thick = max(1.0, uniform(0.05, 0.2) * min(height, width))
        x, y, direction = uniform(0, width), uniform(0, height), uniform(0, 2 * math.pi)
        points = [(x, y)]
        for _ in range(2 + int(uniform(0, 4))):
            direction += uniform(-1.2, 1.2)
            length = uniform(0.1, 0.4) * max(height, width)
            x, y = x + length * math.cos(direction), y + length * math.sin(direction)
            points.append((x, y))
        pen.line(points, fill=255, width=round(thick), joint="curve")
        for x, y in points:
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)
