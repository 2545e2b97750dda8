"""Emoji with their Unicode names: about 1400 captioned pictures without a download, from the system's colour font."""

import hashlib
import io
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

from ldm.data.order import validation_share
from ldm.data.sources.item import Item, image_item
from ldm.errors import ConfigError

FONT = "NotoColorEmoji.ttf"
STRIKE = 109  # the one size of the font's bitmaps, 136 x 128 pixels
USUAL = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts/google-noto-emoji", "~/.fonts")
# Blocks that hold emoji; what the font does not draw is left out.
BLOCKS = ((0x203C, 0x3299), (0x1F000, 0x1FAFF), (0xA9, 0xA9), (0xAE, 0xAE))
REGIONS, TONES = range(0x1F1E6, 0x1F200), range(0x1F3FB, 0x1F400)


class EmojiSource:
    """Every emoji of one code point in the Noto colour font, over white, captioned with its Unicode name."""

    def __init__(
        self,
        image_size: int = 64,
        font: str | None = None,
        validation_fraction: float = 0.03,
        skin_tones: bool = False,
        flags: bool = False,
    ) -> None:
        self.image_size, self.font, self.validation_fraction = image_size, font, validation_fraction
        self.skin_tones, self.flags = skin_tones, flags
        if (skin_tones or flags) and not features.check("raqm"):
            raise ConfigError(
                "skin tones and flags are sequences, which Pillow draws with libraqm only. Install libfribidi0, or"
                " leave source.skin_tones and source.flags false."
            )
        self._words = self._count = 0

    def __iter__(self) -> Iterator[Item]:
        sequences = list(self._sequences())
        held_out = validation_share([text.encode() for text, _ in sequences], self.validation_fraction)
        self._count, self._words = len(sequences), max(len(caption.split()) for _, caption in sequences)
        for (text, caption), val in zip(sequences, held_out, strict=True):
            extra = {"emoji": text, "codes": [f"U+{ord(c):04X}" for c in text]}
            yield image_item(self._draw(text), "png", caption, extra, "val" if val else "train")

    def facts(self) -> dict[str, Any]:
        """Number, size and longest caption."""
        if not self._count:
            next(iter(self))
        return {
            "samples": self._count,
            "image_size": self.image_size,
            "caption_words": self._words,
        }

    def identity(self) -> dict[str, Any]:
        """What determines the content: the font's digest, Unicode's version (the names) and the options."""
        return {
            "source": "emoji",
            "font": hashlib.sha256(self._path.read_bytes()).hexdigest(),
            "unicode": unicodedata.unidata_version,
            "options": [self.image_size, self.validation_fraction, self.skin_tones, self.flags],
        }

    @cached_property
    def _path(self) -> Path:
        path = Path(self.font) if self.font else find_font()
        if path is None or not path.is_file():
            raise ConfigError(
                f"no {self.font or FONT} on this machine. Install it (Debian: apt-get install fonts-noto-color-emoji),"
                " give source.font=PATH, or use source=shapes, which needs no font."
            )
        return path

    @cached_property
    def _loaded(self) -> ImageFont.FreeTypeFont:
        try:
            return ImageFont.truetype(self._path, STRIKE)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: {error}. It needs the font with bitmaps (CBDT) of Debian's fonts-noto-color-emoji."
            ) from None

    def _sequences(self) -> Iterator[tuple[str, str]]:
        """(characters, caption) in the order of the code points."""
        for start, end in BLOCKS:
            for code in range(start, end + 1):
                char, name = chr(code), unicodedata.name(chr(code), "")
                if not name or code in REGIONS or code in TONES or not self._drawn(char):
                    continue
                yield char, name.lower()
                for tone in TONES if self.skin_tones else ():
                    if self._single(char + chr(tone)):
                        yield char + chr(tone), f"{name} {unicodedata.name(chr(tone))[15:]} skin".lower()
        unknown = self._draw(chr(REGIONS[0]) * 2) if self.flags else b""  # the flag with a question mark
        for first in REGIONS if self.flags else ():
            for second in REGIONS:
                if self._draw(chr(first) + chr(second)) != unknown:
                    letters = chr(first - REGIONS[0] + 65) + chr(second - REGIONS[0] + 65)
                    yield chr(first) + chr(second), f"flag of {letters}"

    def _drawn(self, char: str) -> bool:
        return self._loaded.getmask(char, mode="RGBA").getbbox() is not None

    def _single(self, text: str) -> bool:
        """A sequence that the font knows is one glyph wide; others stand side by side."""
        return self._drawn(text) and self._loaded.getlength(text) < 1.5 * self._loaded.getlength("\U0001f600")

    def _draw(self, text: str) -> bytes:
        left, top, right, bottom = self._loaded.getbbox(text)
        side = int(max(right - left, bottom - top))
        picture = Image.new("RGB", (side, side), "white")
        corner = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
        ImageDraw.Draw(picture).text((round(corner[0]), round(corner[1])), text, font=self._loaded, embedded_color=True)
        file = io.BytesIO()
        picture.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS).save(file, "PNG")
        return file.getvalue()


def find_font() -> Path | None:
    """The font where Linux keeps it, or where fontconfig says."""
    for folder in USUAL:
        if (path := Path(folder).expanduser() / FONT).is_file():
            return path
    if shutil.which("fc-list") is None:
        return None
    listed = subprocess.run(["fc-list", ":", "file"], capture_output=True, text=True, check=False, timeout=30).stdout
    return next((Path(line.rstrip(": ")) for line in listed.splitlines() if line.rstrip(": ").endswith(FONT)), None)
