"""From bytes to tensors: latents, crops, flips, colour modes and orientation."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_data import encoded, loader, npy
from PIL import Image

from ldm.data.shards.writer import write_dataset
from ldm.data.sources.item import Item, image_item
from ldm.data.transforms import open_image, read_npy, resize_and_crop, to_rgb
from ldm.errors import ConfigError


def test_latents(tmp_path: Path):
    latents = np.random.default_rng(0).standard_normal((10, 8, 4, 4)).astype(np.float16)
    items = [Item({"latent.npy": npy(latents[i]), "txt": b"c"}) for i in range(10)]
    write_dataset(items, tmp_path / "d")
    for batch in loader(tmp_path / "d", batch_size=5):
        assert batch["latent"].dtype == torch.float32
        assert torch.equal(batch["latent"], torch.from_numpy(latents[batch["index"]]).float())
    for option in ({"flip": True}, {"crop": "random"}):
        with pytest.raises(ConfigError, match=r"data\.(flip|crop)"):
            loader(tmp_path / "d", **option)
    odd = [Item({"latent.npy": npy(np.zeros((8, 4, 5), np.float16)), "txt": b"c"})]
    odd += [Item({"latent.npy": npy(np.array([{}], dtype=object)), "txt": b"c"})]
    write_dataset(items + odd, tmp_path / "odd")
    train = loader(tmp_path / "odd")
    list(train)
    assert train.batches.errors.counts == {"latent of another shape": 1, "unreadable npy": 1}


def test_no_pickle_is_ever_read(tmp_path: Path):
    with pytest.raises(ValueError, match="Python objects"):
        read_npy(npy(np.array([{}], dtype=object)))
    with pytest.raises(ValueError, match="unreadable npy"):
        read_npy(b"\x93NUMPY\x01\x00")


def test_crops_and_flips_depend_on_seed_epoch_and_sample_alone(tmp_path: Path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 30, 3), dtype=np.uint8))
    items = [image_item(encoded(noise), "png", "x") for _ in range(16)]
    write_dataset(items, tmp_path / "d")
    options = {"crop": "random", "flip": True}

    def pictures(train) -> dict[int, torch.Tensor]:
        return {int(i): image for batch in train for i, image in zip(batch["index"], batch["image"], strict=True)}

    one = loader(tmp_path / "d", **options)
    first, second = pictures(one), pictures(one)
    two = [pictures(loader(tmp_path / "d", rank, 2, batch_size=8, **options)) for rank in (0, 1)]
    assert all(torch.equal(first[i], (two[0] | two[1])[i]) for i in range(16))
    assert any(not torch.equal(first[i], second[i]) for i in range(16))
    assert len({image.numpy().tobytes() for image in first.values()}) > 10


@pytest.mark.parametrize("size", [(8, 8), (40, 8), (9, 33), (3, 5), (64, 48)])
def test_resize_and_crop_fills_the_square(size: tuple[int, int]):
    pixels = torch.full((3, *size), 77, dtype=torch.uint8)
    out = resize_and_crop(pixels, 8)
    assert out.shape == (3, 8, 8) and (out == 77).all()
    assert torch.equal(
        resize_and_crop(torch.arange(24).reshape(3, 1, 8).repeat(1, 8, 1).byte(), 8)[0, 0], torch.arange(8)
    )


def test_any_mode_becomes_rgb():
    gray16 = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    assert to_rgb(gray16).getpixel((0, 0)) == (100, 100, 100)
    assert to_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (4, 4), (0, 255))).getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 8, 7] * 256)
    assert to_rgb(palette).getpixel((0, 0)) == (9, 8, 7)
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    cmyk = open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.array(cmyk.getpixel((0, 0))) - (254, 0, 0)).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    from PIL import ImageOps

    image = Image.fromarray(np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((8, 8))).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.array(open_image(data)), np.array(expected))
