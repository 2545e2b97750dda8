"""Captioned pictures made here: one coloured figure, small or large, at one of five places on a plain background.

They need no download, a model learns them in minutes, and `ldm.metrics.shapes` can check what a caption promises.
Some colour x shape pairs are never shown in training: right pictures of those are composed, not remembered.
Lengths are fractions of the picture's side, angles radians; y points down.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.sources.item import Item, image_item
from ldm.errors import ConfigError

VERSION = 3  # part of the identity: raise it when the same arguments give other pictures

# Chosen far apart from each other and from every background (sRGB, 0 to 255).
_COLOURS = {
    "red": (226, 32, 38),
    "orange": (250, 138, 12),
    "yellow": (250, 228, 36),
    "green": (40, 172, 62),
    "cyan": (36, 208, 220),
    "blue": (36, 66, 222),
    "purple": (134, 30, 166),
    "pink": (250, 128, 190),
}
_BACKGROUNDS = {"white": (250, 250, 250), "grey": (130, 130, 130), "black": (10, 10, 10), "brown": (98, 62, 34)}
# Radii keep the two sizes apart for every shape and leave even a large figure room to be beside the centre.
_RADII = {"small": 8.0 / 32, "large": 11.0 / 32}
# Direction from the centre (x, y); a figure goes in it until `_MARGIN` is left.
_PLACES = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}

COLOURS = list(_COLOURS)
SHAPES = ["circle", "square", "triangle", "star", "cross"]
SIZES = list(_RADII)
PLACES = list(_PLACES)
BACKGROUNDS = list(_BACKGROUNDS)
SPLITS = ["train", "val", "unseen"]

_MARGIN = 1.25 / 32
_JITTER = {"place": 0.5 / 32, "radius": 0.04, "angle": math.radians(8), "colour": 9.0, "background": 6.0}

Pair = tuple[str, str]


class ShapesSource:
    """Yields `count` + `validation` captioned pictures of seen pairs and `unseen` of the held-out ones, as Items.

    Picture i of a split is a pure function of (seed, split, i): more pictures never change those that were there.
    """

    def __init__(
        self,
        count: int = 16384,  # pictures to train on
        validation: int = 512,  # more of the same pairs
        image_size: int = 32,  # pixels a side; everything scales with it
        seed: int = 0,
        held_out_fraction: float = 0.15,  # of the 40 colour x shape pairs; which ones does not depend on the seed
        unseen: int = 256,  # pictures of held-out pairs, to measure distances from; never to train on
        softness: float = 0.02,  # standard deviation of the edges, in picture sides: a lens, not a knife
    ):
        if image_size < 16:
            raise ConfigError(f"image_size={image_size}: below 16 pixels all shapes are the same blob. Use 32 or 64.")
        self.counts = {"train": count, "val": validation, "unseen": unseen if pairs_unseen(held_out_fraction) else 0}
        self.image_size = image_size
        self.seed = seed
        self.held_out_fraction = held_out_fraction
        self.softness = softness

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[Item]:
        for split, count in self.counts.items():
            for index in range(count):
                yield self.item(split, index)

    def item(self, split: str, index: int) -> Item:
        """Picture `index` of `split`: png, txt and the attributes as json."""
        pixels, attributes = self.picture(split, index)
        return image_item(encode_png(pixels), "png", caption(attributes), attributes, split)

    def picture(self, split: str, index: int) -> tuple[np.ndarray, dict[str, str]]:
        """(H, W, 3) uint8 and its attributes."""
        pairs = (pairs_unseen if split == "unseen" else pairs_seen)(self.held_out_fraction)
        uniform = _Uniform([self.seed, SPLITS.index(split), index])
        attributes = _draw_attributes(pairs, uniform)
        return render(attributes, self.image_size, uniform, self.softness), attributes

    def facts(self) -> dict[str, Any]:
        """What an experiment wants to know of these data: picture size, caption length, counts, chance levels."""
        return {
            "source": "shapes",
            "held_out_fraction": self.held_out_fraction,
            "image_size": self.image_size,
            "caption_words": max(len(c.split()) for c in all_captions()),
            "counts": dict(self.counts),
            "chance": {
                "colour": 1 / len(COLOURS),
                "shape": 1 / len(SHAPES),
                "size": 1 / len(SIZES),
                "place": 1 / len(PLACES),
                "background": 1 / len(BACKGROUNDS),
            },
        }

    def identity(self) -> dict[str, Any]:
        """The plain values that determine every byte of every item."""
        return {
            "source": "shapes",
            "version": VERSION,
            "counts": dict(self.counts),
            "image_size": self.image_size,
            "seed": self.seed,
            "held_out_fraction": self.held_out_fraction,
            "softness": self.softness,
        }


# Captions and pairs.

_CAPTION = re.compile(
    rf"an? (?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?:at|in) the (?P<place>{'|'.join(PLACES)}) on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


def caption(attributes: dict[str, str]) -> str:
    """{size, colour, shape, place, background} -> "a small red star at the left on a grey background"."""
    preposition = "in" if attributes["place"] == "centre" else "at"
    return "a {size} {colour} {shape} {preposition} the {place} on a {background} background".format(
        **attributes, preposition=preposition
    )


def attributes(caption: str) -> dict[str, str]:
    """The inverse of `caption`."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(f"'{caption}' is not a caption of the shapes, such as '{next(all_captions())}'.")
    return match.groupdict()


def all_captions() -> Iterator[str]:
    """Every caption there can be, unseen pairs included: 1600."""
    for size in SIZES:
        for place in PLACES:
            for background in BACKGROUNDS:
                for colour, shape in _PAIRS:
                    values = {"size": size, "colour": colour, "shape": shape, "place": place, "background": background}
                    yield caption(values)


# 8 and 5 have no common factor, so (3 k mod 8, 2 k mod 5) goes through all 40 pairs, and any run of k spreads evenly
# over colours and over shapes: holding out the first n is balanced.
_PAIRS: list[Pair] = [(COLOURS[3 * k % 8], SHAPES[2 * k % 5]) for k in range(40)]


def pairs_unseen(held_out_fraction: float = 0.15) -> list[Pair]:
    """The (colour, shape) pairs that are never trained on; 6 by default."""
    if not 0 <= held_out_fraction <= 0.8:
        raise ConfigError(
            f"held_out_fraction={held_out_fraction} must be within 0 and 0.8: beyond, some colour would never be seen."
        )
    return _PAIRS[: round(held_out_fraction * len(_PAIRS))]


def pairs_seen(held_out_fraction: float = 0.15) -> list[Pair]:
    """The other pairs; every colour and every shape is among them."""
    return _PAIRS[len(pairs_unseen(held_out_fraction)) :]


def draw_captions(pairs: Sequence[Pair], n: int, seed: int) -> list[str]:
    """n captions that go evenly over `pairs`, everything else drawn at random."""
    drawn = []
    for i in range(n):
        # The 3 keeps this stream apart from the splits' own.
        drawn.append(caption(_draw_attributes([pairs[i % len(pairs)]], _Uniform([seed, len(SPLITS), i]))))
    return drawn


# Rendering.


def render(attributes: dict[str, str], image_size: int, uniform: _Uniform, softness: float) -> np.ndarray:
    """(H, W, 3) uint8 with soft edges; `uniform` jitters place, size, angle and both colours."""
    radius = _RADII[attributes["size"]] * (1 + uniform.signed(_JITTER["radius"]))
    angle = uniform.signed(_JITTER["angle"])
    figure = _jittered(_COLOURS[attributes["colour"]], _JITTER["colour"], uniform)
    ground = _jittered(_BACKGROUNDS[attributes["background"]], _JITTER["background"], uniform)

    outline = radius * _rotated(_OUTLINES[attributes["shape"]], angle)
    low, high = outline.min(axis=0), outline.max(axis=0)  # (x, y) of the figure's own bounding box
    free = (1 - (high - low)) / 2  # from a centred figure to the edge
    step = np.array(_PLACES[attributes["place"]]) * (free - _MARGIN)
    jitter = [uniform.signed(_JITTER["place"]), uniform.signed(_JITTER["place"])]
    centre = 0.5 + step + jitter - (low + high) / 2

    pixel = (np.arange(image_size) + 0.5) / image_size
    x, y = (pixel - centre[0])[None, :].astype(np.float32), (pixel - centre[1])[:, None].astype(np.float32)
    if attributes["shape"] == "circle":
        distance = np.hypot(x, y) - radius * _CIRCLE
    else:
        distance = _signed_distance(x, y, outline.astype(np.float32))
    # A Gaussian edge, never narrower than a pixel's own width (a box of variance 1/12).
    edge = math.hypot(softness, math.sqrt(1 / 12) / image_size)
    coverage = _normal_cdf(-distance / edge)[..., None]
    return (coverage * (figure - ground) + ground + 0.5).clip(0, 255).astype(np.uint8)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    """The standard normal's distribution function to 2e-4 (Page 1977): numpy has none."""
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _jittered(colour: Sequence[int], limit: float, uniform: _Uniform) -> np.ndarray:
    return np.array([channel + uniform.signed(limit) for channel in colour], dtype=np.float32)


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG bytes, packed lightly: these pictures are small and time is not."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _ring(points: int, radius: Sequence[float], turn: float = 0.0) -> np.ndarray:
    """(points, 2) vertices around the origin, the radii in turn, from the top on."""
    angle = 2 * np.pi * np.arange(points) / points + turn
    r = np.resize(np.asarray(radius), points)
    return np.stack([r * np.sin(angle), -r * np.cos(angle)], axis=1)


def _cross(length: float, half_width: float) -> np.ndarray:
    """(12, 2) vertices of a Greek cross."""
    arm = np.array([(-half_width, -length), (half_width, -length), (half_width, -half_width)])
    return np.concatenate([_rotated(arm, quarter * np.pi / 2) for quarter in range(4)])


def _rotated(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


_CIRCLE = 1.05
# In units of the radius; scaled so that all five look equally large (mean width 2.07 to 2.2 radii).
_OUTLINES = {
    "circle": _ring(64, [_CIRCLE]),
    "square": _ring(4, [0.86 * math.sqrt(2)], turn=np.pi / 4),
    "triangle": _ring(3, [1.27]),
    "star": _ring(10, [1.16, 0.5]),
    "cross": _cross(1.06, 0.34),
}


def _signed_distance(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Distance of the points (1, W) x (H, 1) to the polygon's edge, negative inside (even-odd rule)."""
    starts, edges = polygon[:, :, None, None], (np.roll(polygon, -1, axis=0) - polygon)[:, :, None, None]
    (ax, ay), (ex, ey) = starts.swapaxes(0, 1), edges.swapaxes(0, 1)  # (edges, 1, 1) each
    dx, dy = x - ax, y - ay
    along = (dx * (ex / (ex * ex + ey * ey)) + dy * (ey / (ex * ex + ey * ey))).clip(0, 1)
    across_x, across_y = dx - along * ex, dy - along * ey
    distance = np.sqrt((across_x * across_x + across_y * across_y).min(axis=0))
    # A ray to the right crosses the edges that span the point's height and stand on its right-hand side.
    spans = (dy < 0) != (dy - ey < 0)
    right = dx * (ey * np.sign(ey)) < dy * (ex * np.sign(ey))
    inside = (spans & right).sum(axis=0) % 2 == 1
    return np.where(inside, -distance, distance)


class _Uniform:
    """Uniform numbers of one stream, by `Generator.random` alone: the method least likely to change with numpy."""

    def __init__(self, entropy: list[int]):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        self._values = iter(generator.random(24).tolist())

    def signed(self, limit: float) -> float:
        """Within +- limit."""
        return limit * (2 * next(self._values) - 1)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(next(self._values) * len(options))]


def _draw_attributes(pairs: Sequence[Pair], uniform: _Uniform) -> dict[str, str]:
    colour, shape = uniform.choice(pairs)
    return {
        "size": uniform.choice(SIZES),
        "colour": colour,
        "shape": shape,
        "place": uniform.choice(PLACES),
        "background": uniform.choice(BACKGROUNDS),
    }
