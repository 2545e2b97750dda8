"""One HTML file with all that it shows inside: pictures and figures as data, nothing from the net, no scripts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from ldm.analysis.logged import is_number
from ldm.atomic import atomic_write
from ldm.errors import ConfigError

NAME = "report.html"
MOST = 4_500_000  # bytes of a page, about
LARGE, SIDE = 600_000, 2000  # bytes and pixels of a picture that is embedded as it is
INK = "#010203"  # in figures: stands for the page's own ink, which light and dark have each


@dataclass
class Picture:
    """A picture inside the page.

    data: its data URI. note: what was done to it, "" where it is as it was.
    """

    data: str
    width: int
    height: int
    caption: str
    note: str = ""


class Pictures:
    """Embeds pictures while the page's budget lasts."""

    def __init__(self, most: int = MOST):
        self.left, self.missing = most, 0

    def embed(self, path: Path, caption: str = "") -> Picture | None:
        """None for what is no whole picture, and when the page is full: then `missing` counts it."""
        try:
            data, kind = path.read_bytes(), "png"
            with Image.open(io.BytesIO(data)) as image:
                size, note = image.size, ""
                image.load()
                if image.format != "PNG" or len(data) > LARGE:
                    small = image.convert("RGB")
                    small.thumbnail((SIDE, SIDE))
                    buffer = io.BytesIO()
                    small.save(buffer, "JPEG", quality=88)
                    data, kind, size = buffer.getvalue(), "jpeg", small.size
                    note = f"made smaller for this page; whole: {path.name}"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # torn, or none
            self.missing += 1
            return None
        text = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        if len(text) > self.left:
            self.missing += 1
            return None
        self.left -= len(text)
        return Picture(text, *size, caption, note)


def svg(make: Callable[[], Figure], width: float = 4.8, height: float = 3.2) -> Markup | None:
    """A figure as inline SVG in the page's ink and letters, in inches; None where there is nothing to draw yet."""
    try:
        figure = make()
    except ConfigError:
        return None
    figure.set_size_inches(width, height)
    _in_ink(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldm", "font.size": 9}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", text)
    return Markup(text)


def _in_ink(figure: Figure) -> None:
    for axes in figure.axes:
        axes.tick_params(colors=INK, grid_color=INK, grid_alpha=0.12, which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
            spine.set_alpha(0.4)
        if legend := axes.get_legend():
            legend.get_frame().set(facecolor="none", edgecolor="none")
    for text in figure.findobj(Text):
        text.set_color(INK)  # type: ignore[attr-defined]


def bar(
    value: float | None,
    low: float | None,
    high: float | None,
    scale: tuple[float, float],
    mark: float | None = None,
    inner: tuple[float, float] | None = None,
) -> Markup:
    """A value as a dot on its interval, within a scale; mark: of chance, or zero. inner: the thick part of a range."""

    def at(number: float) -> float:
        return round(1 + 98 * min(max((number - scale[0]) / ((scale[1] - scale[0]) or 1), 0), 1), 2)

    parts = ['<rect class="track" x="0" y="6" width="100" height="4" rx="2"/>']
    if low is not None and high is not None and low == low and high == high:
        parts.append(
            f'<rect class="range" x="{at(low)}" y="5" width="{max(at(high) - at(low), 0.6):.2f}" height="6" rx="1.5"/>'
        )
    if inner is not None:
        width = max(at(inner[1]) - at(inner[0]), 0.6)
        parts.append(f'<rect class="inner" x="{at(inner[0])}" y="3.5" width="{width:.2f}" height="9" rx="1.5"/>')
    if mark is not None and mark == mark:
        parts.append(f'<rect class="mark" x="{at(mark) - 0.35:.2f}" y="1" width="0.7" height="14"/>')
    if value is not None and value == value:
        parts.append(f'<rect class="value" x="{at(value) - 0.7:.2f}" y="2.5" width="1.4" height="11" rx="0.7"/>')
    words = "no number" if value is None or value != value else f"{value:.4g}"
    drawn = "".join(parts)
    return Markup(
        f'<svg class="bar" viewBox="0 0 100 16" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f"{drawn}</svg>"
    )


def write(path: Path, template: str, **values: Any) -> Path:
    """Renders a template into a file, in one rename: a reader never sees half a page."""
    try:
        with atomic_write(path) as part:
            part.write_text(_templates().get_template(template).render(**values), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): give another output=FILE.") from error
    return path


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("ldm.report"),
        autoescape=select_autoescape(default=True),  # captions, names and configurations are other people's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["number"] = number
    return made


def number(value: Any) -> str:
    """A number as a table shows it, to four digits; other values as they are."""
    if value is None or (isinstance(value, float) and value != value):
        return "not finite"
    if isinstance(value, bool) or not is_number(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
