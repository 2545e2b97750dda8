"""Does a picture show what its caption says? Colour, shape, size, place and background, read off by geometry.

The reader is written from what the words mean, not from how the training pictures are drawn: colours are the nearest
of everyday colour names in OKLab, shapes the nearest of five textbook figures by moments that turning, moving and
scaling leave alone. A picture without one plain figure on a plain ground has no attributes: it is wrong in all of them.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from ldm.metrics.evaluation import Evaluation

FIGURE_COLOURS = {
    "red": (230, 25, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 230, 25),
    "green": (30, 150, 50),
    "cyan": (20, 215, 230),
    "blue": (30, 60, 230),
    "purple": (130, 20, 160),
    "pink": (255, 130, 190),
}
GROUND_COLOURS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0), "brown": (101, 67, 33)}
WORDS = {
    "colour": list(FIGURE_COLOURS),
    "shape": ["circle", "square", "triangle", "star", "cross"],
    "size": ["small", "large"],
    "place": ["centre", "left", "right", "top", "bottom"],
    "background": list(GROUND_COLOURS),
}
SPELLINGS = {"gray": "grey", "center": "centre", "middle": "centre", "big": "large"}
NONE = -1  # index of an attribute that could not be read
SIZE_BORDER = 0.6  # of the picture's side: what is wider on average is large
PLACE_BORDER = 0.29  # 0: equal room on both sides; 1: the figure touches one side
# Of figures and grounds alike: a grey figure must not pass for the nearest of the eight colours.
_ANCHORS = torch.tensor([*FIGURE_COLOURS.values(), *GROUND_COLOURS.values()], dtype=torch.float32) / 255


class ShapeScore(Metric):
    """Share of pictures (B, 3, H, W) in [-1, 1] that show what their captions say, attribute by attribute.

    What a caption does not mention is not scored. `compute()` gives for each of colour, shape, size, place, background,
    colour_and_shape and all: NAME, NAME/low and NAME/high (Wilson's 95 % interval), NAME/chance, NAME/n; and n.
    """

    full_state_update = False
    right: Tensor
    asked: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.groups = {name: [name] for name in WORDS} | {"colour_and_shape": ["colour", "shape"], "all": list(WORDS)}
        kinds = ("", "/low", "/high", "/n", "/chance")
        names = [*(name + kind for name in self.groups for kind in kinds), "n"]
        self.scores = tuple(f"{half}/{name}" for half in ("seen", "unseen") for name in names)  # of task=evaluate
        self.add_state("right", torch.zeros(len(self.groups), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("asked", torch.zeros(len(self.groups), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, images: Tensor, captions: list[str]) -> None:
        """images (B, 3, H, W) in [-1, 1], one caption each."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures came with {len(captions)} captions.")
        shown = read(images)
        spoken = [words(caption) for caption in captions]
        told = {name: torch.tensor([w.get(name, NONE) for w in spoken], device=images.device) for name in WORDS}
        for row, members in enumerate(self.groups.values()):
            mentioned = torch.stack([told[m] != NONE for m in members])
            equal = torch.stack([told[m] == shown[m] for m in members])
            asked = mentioned.any(dim=0)
            self.asked[row] += asked.sum()
            self.right[row] += (asked & (equal | ~mentioned).all(dim=0)).sum()
        self.seen += len(captions)

    def score(self, evaluation: Evaluation) -> dict[str, float]:
        """Of each half of the captions, where they are the shapes': seen/colour and so on."""
        scores: dict[str, float] = {}
        for half, drawn in evaluation.drawn.items() if evaluation.facts.get("source") == "shapes" else ():
            self.reset()
            for pictures, captions in drawn.captioned():
                self.update(pictures, captions)
            scores |= {f"{half}/{k}": v for k, v in self.compute().items()}
        return scores

    def compute(self) -> dict[str, float]:
        """{colour: 0.98, colour/low: 0.96, colour/high: 0.99, colour/chance: 0.125, colour/n: 256, ..., n: 256}."""
        result: dict[str, float] = {}
        for row, (name, members) in enumerate(self.groups.items()):
            right, asked = int(self.right[row]), int(self.asked[row])
            low, high = wilson(right, asked)
            result[name] = right / asked if asked else math.nan
            result |= {f"{name}/low": low, f"{name}/high": high, f"{name}/n": float(asked)}
            result[f"{name}/chance"] = math.prod(1 / len(WORDS[m]) for m in members)
        return result | {"n": float(self.seen)}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share (Wilson 1927), 95 % by default; (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def words(caption: str) -> dict[str, int]:
    """The first word of each attribute in a caption, as index into `WORDS`; what it does not mention is left out."""
    found = [SPELLINGS.get(word, word) for word in re.findall(r"[a-z]+", caption.lower())]
    told = {}
    for name, options in WORDS.items():
        mentioned = [options.index(word) for word in found if word in options]
        if mentioned:
            told[name] = mentioned[0]
    return told


# Reading a picture.


def read(images: Tensor) -> dict[str, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> for each attribute (B,) indices into `WORDS`, NONE where there is nothing to read."""
    rgb = ((images.float() + 1) / 2).clamp(0, 1)
    ground, cover, figure, plain = segment(rgb)
    shape_distance, shape = shape_distances(cover).min(dim=1)
    width, room_x, room_y = extent(cover)
    colour = nearest_colour(figure)
    background = nearest_colour(ground) - len(FIGURE_COLOURS)
    found = {
        "colour": torch.where(colour < len(FIGURE_COLOURS), colour, NONE),
        "shape": torch.where(shape_distance < 1, shape, NONE),
        "size": (width > SIZE_BORDER).long(),
        "place": _place(room_x, room_y),
        "background": torch.where(background >= 0, background, NONE),
    }
    return {name: torch.where(plain, index, NONE) for name, index in found.items()}


def segment(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] -> ground colour (B, 3), cover (B, H, W) in [0, 1], figure colour (B, 3), plain (B,) bool.

    The ground is the border's colour, the figure's is that of the pixels farthest from it, cover is how far each pixel
    is on the way between the two. plain: it is one figure of one colour on one ground.
    """
    border = torch.cat([rgb[:, :, 0], rgb[:, :, -1], rgb[:, :, :, 0], rgb[:, :, :, -1]], dim=-1)
    ground = border.median(dim=-1).values
    from_ground = (rgb - ground[:, :, None, None]).norm(dim=1)
    contrast = from_ground.flatten(1).quantile(0.99, dim=1).clamp_min(1e-6)
    core = (from_ground > 0.75 * contrast[:, None, None]).float()
    figure = (rgb * core[:, None]).sum(dim=(2, 3)) / core.sum(dim=(1, 2)).clamp_min(1)[:, None]

    way = figure - ground
    cover = torch.einsum("bchw,bc->bhw", rgb - ground[:, :, None, None], way)
    cover = (cover / way.square().sum(dim=1).clamp_min(1e-6)[:, None, None]).clamp(0, 1)
    mixed = ground[:, :, None, None] + cover[:, None] * way[:, :, None, None]
    unexplained = (rgb - mixed).square().sum(dim=1).mean(dim=(1, 2)).sqrt()

    inside = cover > 0.5
    largest = largest_component(inside)
    area = inside.float().mean(dim=(1, 2))
    whole = largest.sum(dim=(1, 2)) > 0.9 * inside.sum(dim=(1, 2))
    plain = whole & (contrast > 0.15) & (unexplained < 0.4 * contrast) & (area > 0.02) & (area < 0.8)
    near = F.max_pool2d(largest[:, None].float(), 3, stride=1, padding=1)[:, 0]  # with its antialiased edge
    return ground, cover * near, figure, plain


def largest_component(mask: Tensor) -> Tensor:
    """(B, H, W) bool -> the same with only its largest connected component, seen at about 32 pixels a side."""
    batch, height, width = mask.shape
    # Coarser, because the loop below takes as many steps as the longest way through a component.
    coarse = F.max_pool2d(mask[:, None].float(), max(1, height // 32), ceil_mode=True)
    # Each pixel starts with a number of its own; the highest number of a component spreads over all of it.
    own = torch.arange(1, coarse[0].numel() + 1, device=mask.device, dtype=torch.float32)
    label = own.view_as(coarse[:1]) * coarse
    while not torch.equal(spread := F.max_pool2d(label, 3, stride=1, padding=1) * coarse, label):
        label = spread
    flat = label.flatten(1).long()
    sizes = torch.zeros(batch, len(own) + 1, device=mask.device).scatter_add_(1, flat, (flat > 0).float())
    largest = (flat == sizes.argmax(dim=1, keepdim=True)).view_as(coarse).float()
    return (F.interpolate(largest, (height, width))[:, 0] > 0) & mask


_TO_LMS = torch.tensor(
    [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
)
_TO_LAB = torch.tensor(
    [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.4505937], [0.02590404, 0.78277177, -0.80867577]]
)


def nearest_colour(rgb: Tensor) -> Tensor:
    """(B, 3) sRGB in [0, 1] -> (B,) index of the nearest colour name, the figures' first, then the grounds'."""
    return torch.cdist(oklab(rgb), oklab(_ANCHORS.to(rgb))).argmin(dim=1)


def oklab(rgb: Tensor) -> Tensor:
    """(B, 3) sRGB in [0, 1] -> (B, 3) OKLab (Ottosson 2020), in which distance is close to perceived difference."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = linear @ _TO_LMS.to(rgb).T
    return lms.clamp_min(0) ** (1 / 3) @ _TO_LAB.to(rgb).T


def extent(cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W) -> (B,) mean width over all directions, as a fraction of the side, and imbalance of room in x and in y.

    Imbalance is 0 with equal room on both sides, 1 for a figure that touches the right (the bottom), -1 at the other.
    """
    _, height, width = cover.shape
    x = (torch.arange(width, device=cover.device) + 0.5) / width
    y = (torch.arange(height, device=cover.device) + 0.5) / height
    angle = torch.arange(8, device=cover.device) * (math.pi / 8)
    along = x[None, None, :] * angle.cos()[:, None, None] + y[None, :, None] * angle.sin()[:, None, None]
    # Per direction, the outermost pixels that are at least half covered, and half a pixel more at either end.
    outside = cover[:, None] <= 0.5
    high = along.masked_fill(outside, -9.0).amax(dim=(2, 3)) + 0.5 / width
    low = along.masked_fill(outside, 9.0).amin(dim=(2, 3)) - 0.5 / width
    imbalance = []
    for axis in (0, 4):  # directions along x and along y
        before, after = low[:, axis], 1 - high[:, axis]
        imbalance.append((before - after) / (before + after).clamp_min(1 / width))
    return (high - low).mean(dim=1), imbalance[0], imbalance[1]


def _place(room_x: Tensor, room_y: Tensor) -> Tensor:
    """(B,), (B,) in [-1, 1] -> (B,) index of centre, left, right, top or bottom: of a corner, the nearer side."""
    sideways = room_x.abs() >= room_y.abs()
    x, y = 1 + (room_x > 0).long(), 3 + (room_y > 0).long()
    centre = torch.maximum(room_x.abs(), room_y.abs()) < PLACE_BORDER
    return torch.where(centre, 0, torch.where(sideways, x, y))


# Shapes by their moments.

_FOLDS = (2, 3, 4, 5)  # 2: an ellipse is no circle
# How much each feature (compactness; n-fold symmetries) may be off before it is none of the figures. The finest gets
# the most: an autoencoder's blur rounds a star's points first.
_TOLERANCE = (0.24, 0.3, 0.3, 0.3, 0.4)


def shape_features(cover: Tensor) -> Tensor:
    """(B, H, W) -> (B, 5): compactness (1 for a disc, less the farther its mass lies out) and 2- to 5-fold symmetry.

    n-fold symmetry is |sum of r^2 exp(i n angle)| / sum of r^2 about the centroid.
    """
    _, height, width = cover.shape
    x = torch.arange(width, device=cover.device, dtype=cover.dtype)[None, None, :]
    y = torch.arange(height, device=cover.device, dtype=cover.dtype)[None, :, None]
    area = cover.sum(dim=(1, 2)).clamp_min(1e-6)
    dx = x - ((cover * x).sum(dim=(1, 2)) / area)[:, None, None]
    dy = y - ((cover * y).sum(dim=(1, 2)) / area)[:, None, None]
    weight = cover * (dx * dx + dy * dy)
    inertia = weight.sum(dim=(1, 2)).clamp_min(1e-6)
    angle = torch.atan2(dy, dx)
    features = [area.square() / (2 * math.pi * inertia)]
    for n in _FOLDS:
        even, odd = (weight * (n * angle).cos()).sum(dim=(1, 2)), (weight * (n * angle).sin()).sum(dim=(1, 2))
        features.append(torch.hypot(even, odd) / inertia)
    return torch.stack(features, dim=1)


def shape_distances(cover: Tensor) -> Tensor:
    """(B, H, W) -> (B, 5) distances from the textbook figures, in tolerances: above 1 it is none of them."""
    prototypes = shape_features(_textbook_figures()).to(cover)
    tolerance = torch.tensor(_TOLERANCE).to(cover)
    difference = (shape_features(cover)[:, None] - prototypes[None]) / tolerance
    return difference.norm(dim=2)


def _textbook_figures(size: int = 96) -> Tensor:
    """(5, size, size) 0 or 1: disc, square, equilateral triangle, pentagram and the cross of five squares."""
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")

    def within(sides: int, inner_radius: float) -> Tensor:  # of how many of a regular polygon's side lines
        angles = torch.arange(sides) * (2 * math.pi / sides) + math.pi / 2
        return torch.stack([x * a.cos() + y * a.sin() <= inner_radius for a in angles]).sum(dim=0)

    # A point of a pentagram is outside at most one of the five lines that its sides lie on.
    figures = [x.square() + y.square() <= 0.64, within(4, 0.6) == 4, within(3, 0.4) == 3, within(5, 0.25) >= 4]
    arm = 0.25
    cross = (x.abs() <= arm) & (y.abs() <= 3 * arm) | (y.abs() <= arm) & (x.abs() <= 3 * arm)
    return torch.stack([*figures, cross]).float()
