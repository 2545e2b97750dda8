"""From the bytes of a sample to tensors: own decoders by extension, never webdataset's (those execute pickles)."""

import io
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from ldm.data.captions import SampleError
from ldm.data.fields import Fields
from ldm.data.order import uniforms
from ldm.data.shards.splits import LATENT_FIELD, MIRRORED_FIELD
from ldm.errors import ConfigError

MAX_PIXELS = 64_000_000  # decoded, that is 192 MB; a 10 kB file can claim far more
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
ORIENTATION = 0x0112
# What each EXIF orientation asks for, by value 2..8 (EXIF 2.32, 4.6.4 A).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow warns above 89 M pixels; ours is a refusal, and lower. Set once: catch_warnings is not safe among threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    at_least: int | None = None,
) -> Image.Image:
    """A decoded picture: upright, RGB, alpha laid over white; SampleError if it is broken or claims too many pixels.

    The size in the header is tested before anything is decoded. `at_least` lets a JPEG be scaled while decoding, as
    long as both sides stay above it (at twice the final size: 52 dB from the full decode, for much less CPU).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if width * height > max_pixels:
            raise SampleError("too many pixels", f"{width} x {height} is more than {max_pixels} pixels")
        if at_least is not None and image.format == "JPEG":
            image.draft("RGB", (at_least, at_least))
        image.load()
        return to_rgb(_upright(image))
    except SampleError:
        raise
    except UnidentifiedImageError:
        raise SampleError("undecodable image", f"no picture in a known format ({len(data)} bytes)") from None
    except Exception as error:  # Pillow's decoders raise whatever their format's parser meets
        raise SampleError("undecodable image", f"undecodable image: {type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    if "exif" not in image.info:
        return image
    turn = _UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return image.transpose(turn) if turn is not None else image


def to_rgb(image: Image.Image, behind: int = 255) -> Image.Image:
    """Any mode to RGB: 16 bits are scaled (Pillow's own conversion clips them), transparency shows what is behind.

    behind: the grey, 0 (black) to 255 (white).
    """
    clear = image.info.get("transparency")
    if image.mode == "RGB" and clear is None:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.asarray(image, dtype=np.float32)
        scale = 257.0 if image.mode != "F" else max(float(gray.max()), 1.0) / 255
        shown = np.where(gray == clear, behind, gray / scale) if isinstance(clear, int) else gray / scale
        return Image.fromarray(shown.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ground = Image.new("RGBA", layer.size, (behind, behind, behind, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def read_npy(data: bytes) -> np.ndarray:
    """An array from .npy bytes without copying and without pickles."""
    try:
        length = (
            10 + int.from_bytes(data[8:10], "little")
            if data[6:7] == b"\x01"
            else 12 + int.from_bytes(data[8:12], "little")
        )
        dtype, shape, fortran = _npy_header(data[:length])
        array = np.frombuffer(data, dtype, offset=length)
        return array.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise SampleError("unreadable npy", f"unreadable npy: {error}") from None


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """All arrays of a data set share one header, and parsing it costs ten times as much as reading one."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which only a pickle could read")
    return dtype, shape, fortran


class DecodeImage:
    """First map stage: sample dict -> {"image": RGB picture, "caption", ...}."""

    def __init__(self, image_size: int, fields: Fields | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.at_least, self.fields, self.max_pixels = 2 * image_size, fields or Fields(), max_pixels
        self.members = self.fields.members

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        image = open_image(self.fields.picture_of(sample), self.max_pixels, at_least=self.at_least)
        return carry(sample) | {"image": image, "caption": self.fields.caption_of(sample)}


class CropImage:
    """Second map stage: shortest side to `image_size` (antialiased), crop, flip -> uint8 tensor (3, H, W).

    Crop and flip are functions of (seed, epoch, sample), so neither rank nor thread nor a restart changes them.
    """

    def __init__(self, image_size: int, crop: str = "centre", flip: bool = False, seed: int = 0) -> None:
        if crop not in ("centre", "random"):
            raise ConfigError(f"data.crop={crop}: there is centre and random.")
        self.image_size, self.crop, self.flip, self.seed = image_size, crop, flip, seed

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1)
        across = down = 0.5
        if self.crop == "random" or self.flip:
            u = uniforms(self.seed, "crop", sample["__epoch__"], sample["__index__"])
            if self.crop == "random":
                across, down = u[0], u[1]
            if self.flip and u[2] < 0.5:
                pixels = pixels.flip(-1)
        sample["image"] = resize_and_crop(pixels, self.image_size, across, down)
        return sample


def resize_and_crop(pixels: torch.Tensor, size: int, across: float = 0.5, down: float = 0.5) -> torch.Tensor:
    """(3, h, w) uint8 -> (3, size, size): shortest side to size, then the window at (across, down) in [0, 1]."""
    height, width = pixels.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(round(height * scale), size), max(round(width * scale), size))
        pixels = F.interpolate(pixels[None], target, mode="bicubic", antialias=True)[0]
        height, width = target
    top = min(int(down * (height - size + 1)), height - size)
    left = min(int(across * (width - size + 1)), width - size)
    return pixels[:, top : top + size, left : left + size].contiguous()


class DecodeLatent:
    """The map stage of encoded data sets: `latent.npy` (MC, h, w), the moments of each channel, as float arrays.

    With `flip` the encoder must have stored the mirrored picture's latent too: the mirrored latent is another one.
    """

    def __init__(
        self, shape: tuple[int, ...] | None = None, fields: Fields | None = None, flip: bool = False, seed: int = 0
    ) -> None:
        self.shape, self.fields, self.flip, self.seed = shape, fields or Fields(), flip, seed
        self.members = (LATENT_FIELD, *((MIRRORED_FIELD,) if flip else ()), *self.fields.caption_members)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        name = LATENT_FIELD
        if self.flip and uniforms(self.seed, "crop", sample["__epoch__"], sample["__index__"])[2] < 0.5:
            name = MIRRORED_FIELD
        if name not in sample:
            raise SampleError("no latent", f"no {name}; present: {', '.join(f for f in sample if f[:2] != '__')}")
        latent = read_npy(sample[name])
        if self.shape is not None and latent.shape != self.shape:
            raise SampleError("latent of another shape", f"latent of shape {latent.shape}, the first has {self.shape}")
        return carry(sample) | {"latent": latent, "caption": self.fields.caption_of(sample)}


def carry(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are about the sample, not of it: __key__, __url__, __index__, __epoch__."""
    return {name: value for name, value in sample.items() if name.startswith("__")}
