"""Tensors as pictures: grids with captions, and the film strip of a sampling run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import NotFinite

MARGIN = 4
MOST_CHANNELS = 16  # of latents that a sheet shows
COMPARED = ("input", "output", "difference x4")


def to_pil(image: Tensor) -> Image.Image:  # (3,H,W) in [-1, 1]
    """Clipped and rounded to 8 bits."""
    return Image.fromarray(to_bytes(image[None])[0])


def from_pil(image: Image.Image) -> Tensor:  # -> (C,H,W) in [-1, 1]
    """The inverse of `to_pil`, one channel for grey pictures."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    return rearrange(pixels.reshape(*pixels.shape[:2], -1), "h w c -> c h w")


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def in_256(images: Tensor) -> Tensor:
    """(B,3,H,W) in [-1, 1] -> the whole numbers 0 to 255 that a file would hold, float32, where they are."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()


def to_bytes(images: Tensor) -> np.ndarray:  # (B,3,H,W) in [-1, 1] -> (B,H,W,3) uint8
    if bool(images.isnan().any()):
        raise NotFinite("a picture holds NaN, which would be shown as black: the weights or latents behind it hold it.")
    return rearrange(in_256(images.cpu()).to(torch.uint8), "b c h w -> b h w c").numpy()


def grid(images: Tensor, labels: Sequence[str] = (), columns: int | None = None, side: int = 96) -> Image.Image:
    """(B,3,H,W) in [-1, 1] side by side, small ones enlarged to about `side` pixels, each above its label."""
    tiles = [_enlarged(image, side) for image in images]
    labels = [str(label) for label in labels] or [""] * len(tiles)
    columns = columns or max(1, min(8, len(tiles)))
    width, height = tiles[0].size
    lines = [textwrap.wrap(label, max(8, width // 6)) for label in labels]
    text = 12 * max((len(ls) for ls in lines), default=0)
    rows = -(-len(tiles) // columns)
    sheet = _sheet(columns * (width + MARGIN) + MARGIN, rows * (height + text + MARGIN) + MARGIN)
    draw = ImageDraw.Draw(sheet)
    for i, (tile, label) in enumerate(zip(tiles, lines, strict=True)):
        x, y = MARGIN + (i % columns) * (width + MARGIN), MARGIN + (i // columns) * (height + text + MARGIN)
        sheet.paste(tile, (x, y))
        draw.multiline_text((x, y + height), "\n".join(label), fill="black", font=_font(), spacing=1)
    return sheet


def reconstruction_rows(images: Tensor, outputs: Tensor, z: Tensor) -> Tensor:
    """What an autoencoder does to pictures, (B,R,3,H,W) in [-1, 1]: input, output, their difference x4 around grey, and
    the first 16 channels of the latents.

    images, outputs (B,3,H,W) in [-1, 1]; z (B,C,h,w). A picture's latents have one unit, in which the largest number is
    black or white and 0 is grey: nothing is shared between pictures, which other processes may hold.
    """
    outputs = outputs.float().clamp(-1, 1)
    difference = (4 * (outputs - images)).clamp(-1, 1)
    unit = z.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    greys = F.interpolate((z / unit)[:, :MOST_CHANNELS].float(), images.shape[-2:], mode="nearest")
    greys = greys[:, :, None].expand(-1, -1, 3, -1, -1)
    return torch.cat([torch.stack([images, outputs, difference], dim=1), greys], dim=1)


def reconstruction_sheet(rows: Tensor) -> Image.Image:  # (B,R,3,H,W) of `reconstruction_rows`, on the host
    """A column a picture; the first says what each row is."""
    names = [*COMPARED, *(f"channel {i}" for i in range(rows.shape[1] - len(COMPARED)))]
    labels = [name if i == 0 else "" for name in names for i in range(len(rows))]
    return grid(rearrange(rows, "b r c h w -> (r b) c h w"), labels, columns=len(rows))


@dataclass
class Frame:
    """One step of a film strip; images are (B,3,H,W) in [-1, 1]."""

    number: int
    sigma: float  # sigma/alpha of x_t
    current: Tensor  # x_t, decoded
    jump: Tensor  # x0, decoded


def film_strip(frames: Sequence[Frame], prompts: Sequence[str] = (), side: int = 64) -> Image.Image:
    """Columns are steps; for each prompt the current latent stands above its jump to x0."""
    count = len(frames[0].current)
    width, height = _enlarged(frames[0].current[0], side).size
    left, head, between = 44, 28, 14 if prompts else 0
    block = between + 2 * (height + MARGIN)
    sheet = _sheet(left + len(frames) * (width + MARGIN), head + count * block + MARGIN)
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(frames):
        x = left + column * (width + MARGIN)
        draw.multiline_text(
            (x, 2), f"step {frame.number}\nsigma {_short(frame.sigma)}", fill="black", font=_font(), spacing=1
        )
        for i in range(count):
            y = head + i * block + between
            sheet.paste(_enlarged(frame.current[i], side), (x, y))
            sheet.paste(_enlarged(frame.jump[i], side), (x, y + height + MARGIN))
    for i in range(count):
        y = head + i * block
        if prompts:
            draw.text((left, y), prompts[i], fill="black", font=_font())
        draw.text((2, y + between + height // 2 - 6), "x_t", fill="black", font=_font())
        draw.text((2, y + between + MARGIN + height + height // 2 - 6), "jump", fill="black", font=_font())
    return sheet


def curves(x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Image.Image:
    """A small figure of named lines against x, x on a logarithmic axis; the first has dots, the others are dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3), dpi=100, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel=x_label, ylabel=y_label)
    for i, (name, y) in enumerate(lines.items()):
        axes.plot(x, y, marker="o" if i == 0 else None, linestyle="-" if i == 0 else "--", label=name)
    if 0 < max(x) < 100 * min(x) and len(x) <= 12:  # powers of ten alone would say too little
        axes.set_xticks(x, labels=[f"{value:g}" for value in x], fontsize="small")
        axes.set_xticks([], minor=True)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"  # 20291, not 2.03e+04: columns are narrow


def _enlarged(image: Tensor, side: int) -> Image.Image:
    picture = to_pil(image)
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=10)
