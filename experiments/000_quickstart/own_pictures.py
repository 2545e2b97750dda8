"""Makes a folder of 500 captioned pictures as people have them: mixed formats, sizes and captions, some of them bad.

python experiments/000_quickstart/own_pictures.py DIR
"""

import json
import sys
from pathlib import Path

from PIL import Image

from ldm.data.sources.shapes import ShapesSource, caption

FORMATS = ["jpg", "png", "webp", "gif", "bmp"]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(500):
        side = 48 + 37 * i % 160
        pixels, attributes = ShapesSource(image_size=side, seed=7).picture("train", i)
        image = Image.fromarray(pixels)
        if i % 3 == 0:  # not square
            image = image.resize((side, int(side * 1.3)))
        name = folder / f"{['summer', 'autumn'][i % 2]} {i:03d}"
        image.save(f"{name}.{FORMATS[i % 5]}")
        if i % 40 == 7:
            continue  # no caption
        if i % 4 == 0:
            Path(f"{name}.json").write_text(json.dumps({"caption": caption(attributes)}))
        else:
            Path(f"{name}.txt").write_text(caption(attributes) + "\n")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this was a picture once")
    (folder / "broken.txt").write_text("a picture that cannot be read")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
