"""Pictures and latents for short runs."""

import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight captioned pictures of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        image = Image.new("RGB", (70 + 9 * i, 90), (30 * i, 120, 220 - 20 * i))
        ImageDraw.Draw(image).ellipse((12, 8, 48, 60), fill=(250, 20 * i, 10))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of a very red cat, number {i}")
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Latent shards of shapes. Never write in them."""
    from tiny_training import make_data  # what it imports takes seconds

    return make_data(tmp_path_factory.mktemp("data"))[2]
