"""Pictures and masks in every mode that painting programs save: strokes are white where they cover the layer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from ldm import Pipeline
from ldm.errors import ConfigError

SIZE = 64
BOX = (8, 8, 31, 23)
ROOM = Image.effect_noise((SIZE, SIZE), 70).convert("RGB")


def strokes(mode: str, ground, paint) -> Image.Image:
    made = Image.new(mode, (SIZE, SIZE), ground)
    ImageDraw.Draw(made).rectangle(BOX, fill=paint)
    return made


def palette(clear: bool) -> Image.Image:
    """White strokes in a palette: on black, or on a white that is transparent."""
    made = strokes("P", 0, 1)
    made.putpalette([*(3 * [255 if clear else 0]), 255, 255, 255] + 254 * [9, 9, 9])
    if clear:
        made.info["transparency"] = 0
    return made


def white_palette_with_alpha() -> Image.Image:
    made = Image.new("PA", (SIZE, SIZE))
    made.putpalette(256 * [255, 255, 255])
    made.putalpha(strokes("L", 0, 255))
    return made


def wide(dtype, key: int | None = None) -> Image.Image:
    pixels = np.full((SIZE, SIZE), key or 0, dtype)
    pixels[BOX[1] : BOX[3] + 1, BOX[0] : BOX[2] + 1] = 65535
    made = Image.fromarray(pixels)
    if key is not None:
        made.info["transparency"] = key
    return made


WHITE_ON_NOTHING = {
    "RGBA": strokes("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)),
    "RGBA, the layer's colour white": strokes("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
    "LA": strokes("LA", (255, 0), (255, 255)),
    "La": strokes("LA", (255, 0), (255, 255)).convert("La"),
    "RGBa": strokes("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)).convert("RGBa"),
    "PA": white_palette_with_alpha(),
    "P": palette(clear=True),
    "I;16": wide(np.uint16, key=60000),
}
WHITE_ON_BLACK = {
    "L": strokes("L", 0, 255),
    "1": strokes("1", 0, 1),
    "P": palette(clear=False),
    "I": wide(np.int32),
    "I;16": wide(np.uint16),
    "F": wide(np.float32),
    "RGB": strokes("RGB", "black", "white"),
    "CMYK": strokes("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)),
    "HSV": strokes("HSV", (0, 0, 0), (0, 0, 255)),
    "opaque RGBA": strokes("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)),
}


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    return Pipeline.load(sd1_folder)


def painted(pipe: Pipeline, mask) -> torch.Tensor:
    found = pipe.request("a", init_image=ROOM, mask=mask).mask
    assert found is not None and set(found.unique().tolist()) <= {0.0, 1.0}
    return found[0, 0].bool()


def box() -> torch.Tensor:
    found = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    found[BOX[1] : BOX[3] + 1, BOX[0] : BOX[2] + 1] = True
    return found


@pytest.mark.parametrize("mode", WHITE_ON_NOTHING)
def test_white_strokes_on_a_transparent_layer_are_painted_alone(pipe, mode):
    assert torch.equal(painted(pipe, WHITE_ON_NOTHING[mode]), box())


@pytest.mark.parametrize("mode", WHITE_ON_BLACK)
def test_white_strokes_on_black_are_painted(pipe, mode):
    assert torch.equal(painted(pipe, WHITE_ON_BLACK[mode]), box())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "RGB", "opaque RGBA"])
def test_a_mask_is_what_diffusers_makes_of_it(pipe, mode):
    """On the layers that painting programs save, transparent black; the colour of a hidden layer diffusers looks at."""
    given = {"RGBA": WHITE_ON_NOTHING["RGBA"], "LA": strokes("LA", (0, 0), (255, 255))}.get(mode)
    given = given or WHITE_ON_BLACK[mode]
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = processor.preprocess(given, height=SIZE, width=SIZE)
    assert torch.equal(painted(pipe, given), theirs[0, 0].bool())


def test_a_mask_may_be_inverted(pipe):
    """What is kept painted black on white, or cut out of a white layer; soft strokes count from half their cover."""
    for mask in (
        strokes("L", 255, 0),
        strokes("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)),
        strokes("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
        strokes("LA", (255, 255), (255, 0)),
    ):
        assert torch.equal(painted(pipe, mask), ~box())
    for cover, counts in ((120, False), (136, True)):
        soft = painted(pipe, strokes("RGBA", (255, 255, 255, 255), (255, 255, 255, cover)))
        assert torch.equal(soft, torch.ones_like(box()) if counts else ~box())


def test_a_mask_without_white_is_said(pipe):
    """Black strokes on a transparent layer: nothing can be told from them."""
    with pytest.warns(UserWarning, match="nothing white, so nothing is repainted"):
        assert not painted(pipe, strokes("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        painted(pipe, strokes("L", 0, 255))


def test_masks_come_from_files_upright(pipe, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for name, mask in (
        ("layer.png", WHITE_ON_NOTHING["RGBA"]),
        ("palette.png", palette(True)),
        ("wide.png", wide(np.uint16)),
    ):
        mask.save(tmp_path / name, **({"transparency": 0} if name == "palette.png" else {}))
        assert torch.equal(painted(pipe, tmp_path / name), box())
        mask.save(tmp_path / name, exif=exif, **({"transparency": 0} if name == "palette.png" else {}))
        assert torch.equal(painted(pipe, tmp_path / name), box().flip(0, 1))


def test_pictures_keep_their_colours_in_every_mode(pipe, tmp_path):
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1).expand(3, SIZE, SIZE)
    size = (SIZE, SIZE)
    Image.new("CMYK", size, (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    for picture in (Image.new("RGB", size, "red"), Image.new("CMYK", size, (0, 255, 255, 0)), tmp_path / "red.jpg"):
        found = pipe.request("a", init_image=picture).init_image[0]
        torch.testing.assert_close(found, red, atol=0.03, rtol=0)
    grey = pipe.request("a", init_image=Image.fromarray(np.full(size, 257 * 51, np.uint16))).init_image
    torch.testing.assert_close(grey, torch.full_like(grey, 51 / 127.5 - 1), atol=1e-6, rtol=0)
    clear = pipe.request("a", init_image=strokes("RGBA", (0, 0, 0, 0), (255, 0, 0, 255))).init_image[0]
    assert torch.equal(clear[1] < 0, box()) and clear[0].min() == 1, "red on white: a picture's transparency is white"


@pytest.mark.parametrize("picture", [torch.full((3, 64, 64), torch.nan), torch.zeros(3, 64, 64, dtype=torch.uint8)])
def test_tensors_are_pictures_of_finite_numbers(pipe, picture):
    with pytest.raises(ConfigError, match="init_image as a tensor must hold finite numbers"):
        pipe.request("a", init_image=picture)
