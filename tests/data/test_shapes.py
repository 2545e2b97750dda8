"""The shapes: a pure function of (seed, split, index), with pairs that training never sees."""

import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm.data.sources import shapes
from ldm.data.sources.shapes import ShapesSource
from ldm.errors import ConfigError

DIGEST = """
import hashlib
from ldm.data.sources.shapes import ShapesSource
digest = hashlib.sha256()
for item in ShapesSource(count=12, validation=4, unseen=4, seed=3):
    for name in sorted(item.fields):
        digest.update(item.split.encode() + name.encode() + item.fields[name])
print(digest.hexdigest())
"""


def pair(item):
    values = shapes.attributes(item.fields["txt"].decode())
    return values["colour"], values["shape"]


def test_two_processes_make_the_same_bytes():
    digest = hashlib.sha256()
    for item in ShapesSource(count=12, validation=4, unseen=4, seed=3):
        for name in sorted(item.fields):
            digest.update(item.split.encode() + name.encode() + item.fields[name])
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest.hexdigest()


def test_a_picture_depends_on_seed_split_and_index_alone():
    few, many = ShapesSource(count=4, validation=2, unseen=2), ShapesSource(count=400, validation=9, unseen=7)
    wanted = {split: [item.fields for item in few if item.split == split] for split in shapes.SPLITS}
    for split, items in wanted.items():
        assert [many.item(split, i).fields for i in range(len(items))] == items
    pictures = {many.item(split, 0).fields["png"] for split in shapes.SPLITS}
    pictures |= {ShapesSource(seed=1).item("train", 0).fields["png"], many.item("train", 1).fields["png"]}
    assert len(pictures) == 5


def test_counts_and_identity():
    source = ShapesSource(count=20, validation=6, unseen=5)
    splits = [item.split for item in source]
    assert {s: splits.count(s) for s in set(splits)} == {"train": 20, "val": 6, "unseen": 5} == source.facts()["counts"]
    assert len(source) == 31
    assert json.loads(json.dumps(source.identity())) == source.identity() == ShapesSource(20, 6, unseen=5).identity()
    assert source.identity() != ShapesSource(20, 6, unseen=5, seed=1).identity()
    assert source.facts()["caption_words"] == 11


def test_unseen_pairs_are_only_in_unseen():
    source = ShapesSource(count=600, validation=200, image_size=16, unseen=100)
    shown = {split: set() for split in shapes.SPLITS}
    for item in source:
        shown[item.split].add(pair(item))
    assert shown["unseen"] == set(shapes.pairs_unseen())
    assert shown["train"] == set(shapes.pairs_seen())
    assert shown["val"] <= shown["train"]
    assert ShapesSource(count=1, held_out_fraction=0.0).counts["unseen"] == 0


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.15, 0.5, 0.8])
def test_held_out_pairs_are_balanced(fraction):
    unseen, seen = shapes.pairs_unseen(fraction), shapes.pairs_seen(fraction)
    assert len(unseen) == round(40 * fraction) and len({*unseen, *seen}) == 40
    assert {c for c, _ in seen} == set(shapes.COLOURS) and {s for _, s in seen} == set(shapes.SHAPES)
    for options, position in ((shapes.COLOURS, 0), (shapes.SHAPES, 1)):
        counts = [sum(p[position] == option for p in unseen) for option in options]
        assert max(counts) - min(counts) <= 1


def test_captions_and_attributes_are_inverse():
    captions = list(shapes.all_captions())
    assert len(set(captions)) == 8 * 5 * 2 * 5 * 4
    assert all(shapes.caption(shapes.attributes(caption)) == caption for caption in captions)
    assert "a small red star at the left on a grey background" in captions
    with pytest.raises(ValueError, match="not a caption"):
        shapes.attributes("a photo of a cat")


def test_drawn_captions_go_evenly_over_the_pairs():
    pairs = shapes.pairs_unseen()
    captions = shapes.draw_captions(pairs, 60, seed=5)
    assert captions == shapes.draw_captions(pairs, 60, seed=5) != shapes.draw_captions(pairs, 60, seed=6)
    drawn = [(a["colour"], a["shape"]) for a in map(shapes.attributes, captions)]
    assert all(drawn.count(p) == 10 for p in pairs) and len(set(captions)) > 40


@pytest.mark.parametrize("image_size", [32, 64])
def test_figures_stay_inside_the_frame_and_are_no_duplicates(image_size):
    source = ShapesSource(image_size=image_size)
    seen = set()
    for index in range(150):
        item = source.item("train", index)
        pixels = np.array(Image.open(io.BytesIO(item.fields["png"])))
        assert pixels.shape == (image_size, image_size, 3) and pixels.dtype == np.uint8
        assert json.loads(item.fields["json"]) == shapes.attributes(item.fields["txt"].decode())
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(int)
        assert np.abs(border - np.median(border, axis=0)).max() <= 0.3 * 255  # at most the figure's antialiasing
        seen.add(item.fields["png"])
    assert len(seen) == 150


def test_errors_name_the_way_out():
    with pytest.raises(ConfigError, match="32 or 64"):
        ShapesSource(image_size=8)
    with pytest.raises(ConfigError, match=r"within 0 and 0\.8"):
        ShapesSource(held_out_fraction=0.95)
