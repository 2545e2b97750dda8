"""Sources: whatever lies in a folder becomes samples or named rejects; the same folder is the same data set."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from ldm.data.datamodule import ShardDataModule
from ldm.data.shards.splits import open_split
from ldm.data.shards.writer import write_dataset
from ldm.data.sources.emoji import EmojiSource, find_font
from ldm.data.sources.folder import FolderSource, formats
from ldm.data.sources.item import Item, Reject, Source
from ldm.data.sources.shapes import ShapesSource
from ldm.data.sources.tables import read_table
from ldm.data.transforms import open_image
from ldm.errors import ConfigError
from ldm.tasks.work.prepare import prepare_shards


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What people have: many formats, sub-folders, captions of all kinds, and some that cannot be used."""
    root = tmp_path / "pictures"
    (root / "sub folder").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(root / "plain.jpg")
    picture().save(root / "rotated.JPEG", exif=exif)
    picture(mode="CMYK").save(root / "cmyk.jpg")
    picture().save(root / "sub folder" / "web, p=1.webp")
    picture(mode="P").save(root / "indexed.gif")
    picture().save(root / "bitmap.bmp")
    Image.fromarray(np.full((33, 44), 30000, np.uint16)).save(root / "deep.png")
    picture(mode="RGBA").save(root / "alpha.png")
    picture().save(root / "scan.tiff")
    for path in list(root.rglob("*.*")):
        path.with_suffix(".txt").write_text(f"a caption of {path.stem}\n", encoding="utf-8-sig")
    picture().save(root / "described.png")
    (root / "described.json").write_text(json.dumps({"caption": "un café, señor"}))
    picture().save(root / "silent.png")
    picture(8, 8).save(root / "tiny.png")
    picture().save(root / "latin.png")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "broken.jpg").write_bytes((root / "plain.jpg").read_bytes()[:300])
    (root / "broken.txt").write_text("x")
    (root / "fake.png").write_text("not a picture")
    (root / "notes.md").write_text("not a picture either")
    (root / ".hidden.png").write_bytes(b"")
    return root


def test_a_mixed_folder_becomes_samples_and_named_rejects(folder: Path, tmp_path: Path):
    source = FolderSource(str(folder), validation_fraction=0)
    written = write_dataset(source, tmp_path / "d", facts=source.facts, identity=source.identity())
    assert written.samples == {"train": 10}
    assert written.rejected == {"undecodable image": 2, "no caption": 1, "too small": 1, "caption is not UTF-8": 1}
    data = ShardDataModule(str(tmp_path / "d"), 32, 10, validation_fraction=0, shuffle=False)
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (10, 3, 32, 32) and len(data.train_dataloader().batches.errors.counts) == 0
    assert {"un café, señor", "a caption of web, p=1"} < set(batch["caption"])
    assert data.facts["image_size"] == 32 == written.facts["image_size"]
    assert data.facts["caption_words"] == 5 and data.facts["median_side"] == 30


def test_pictures_keep_their_bytes_where_the_format_allows(folder: Path):
    items = {json.loads(i.fields["json"])["path"]: i.fields for i in FolderSource(str(folder)) if isinstance(i, Item)}
    for name, ext in (
        ("plain.jpg", "jpg"),
        ("cmyk.jpg", "jpg"),
        ("alpha.png", "png"),
        ("sub folder/web, p=1.webp", "webp"),
    ):
        assert items[name][ext] == (folder / name).read_bytes()
    for name in ("indexed.gif", "bitmap.bmp", "scan.tiff"):
        assert np.array_equal(
            open_image(items[name]["png"]), open_image((folder / name).read_bytes(), formats=formats())
        )
    assert open_image(items["rotated.JPEG"]["jpg"]).size == (30, 40)


def test_identity_follows_the_content_not_the_time(folder: Path):
    def identity(**options):
        return FolderSource(str(folder), **options).identity()

    first = identity()
    assert first["by"] == "content" and first == identity() and json.dumps(first)
    os.utime(folder / "plain.jpg", (1, 1))
    assert identity() == first != identity(min_side=20)
    (folder / "silent.txt").write_text("not silent any more")
    assert identity() != first


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_order_and_bytes_do_not_depend_on_threads(folder: Path, threads: int):
    assert list(FolderSource(str(folder), threads=threads)) == list(FolderSource(str(folder)))


def test_the_validation_share_is_written_as_a_split(tmp_path: Path):
    (tmp_path / "p").mkdir()
    for i in range(30):
        picture().save(tmp_path / f"p/{i}.png")
        (tmp_path / f"p/{i}.txt").write_text(f"nr {i}")
    written = write_dataset(FolderSource(str(tmp_path / "p"), validation_fraction=0.1), tmp_path / "d")
    assert written.samples == {"train": 27, "val": 3} and len(open_split(tmp_path / "d", "val")) == 3


TABLE = [("a.png", "first, with comma"), ("sub/b.png", 'second "quoted"')]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_metadata_files(suffix: str, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name, _ in TABLE:
        picture().save(tmp_path / name)
    path = tmp_path / f"metadata.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"file_name": f, "text": t}) for f, t in TABLE))
    elif suffix == "parquet":
        pytest.importorskip("pyarrow")
        pandas.DataFrame(TABLE, columns=["path", "caption"]).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if suffix == "tsv" else ",").writerows([("file_name", "caption"), *TABLE])
    found = [item.fields["txt"].decode() for item in FolderSource(str(tmp_path), validation_fraction=0)]
    assert found == [text for _, text in TABLE]


def test_errors_say_what_to_type(tmp_path: Path):
    (tmp_path / "t.csv").write_text("name,words\na,b\n")
    with pytest.raises(ConfigError, match=r"columns name, words; it needs one of file_name"):
        read_table(tmp_path / "t.csv")
    for images, words in ((None, "images=DIR"), (tmp_path / "no", "no such folder"), (tmp_path, "holds no pictures")):
        with pytest.raises(ConfigError, match=words):
            list(FolderSource(images and str(images)))
    picture().save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"does not exist"):
        list(FolderSource(str(tmp_path), captions="none.csv"))
    source = FolderSource(str(tmp_path))
    with pytest.raises(ConfigError, match=r"nothing to write.*no caption \(first: a\.png\)"):
        write_dataset(source, tmp_path / "d", facts=source.facts)
    with pytest.raises(ConfigError, match="no usable picture"):
        source.facts()
    assert [i.fields["txt"] for i in FolderSource(str(tmp_path), uncaptioned=True)] == [b""]


def test_a_pixel_bomb_is_a_reject(tmp_path: Path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    assert [item.reason for item in FolderSource(str(tmp_path)) if isinstance(item, Reject)] == ["too many pixels"]


def test_emoji_without_a_font_names_the_package(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match="fonts-noto-color-emoji"):
        EmojiSource(font=str(tmp_path / "none.ttf")).identity()


@pytest.mark.skipif(find_font() is None, reason="no Noto colour emoji font")
def test_emoji(monkeypatch):
    monkeypatch.setattr("ldm.data.sources.emoji.BLOCKS", ((0x1F600, 0x1F640),))
    source = EmojiSource(image_size=32)
    items = list(source)
    assert items == list(EmojiSource(image_size=32)) and len(items) == 65 == source.facts()["samples"]
    assert items[0].fields["txt"] == b"grinning face" and {i.split for i in items} == {"train", "val"}
    image = np.array(Image.open(io.BytesIO(items[0].fields["png"])))
    assert image.shape == (32, 32, 3) and (image[0, 0] == 255).all() and image[16, 16, 0] > image[16, 16, 2]


def test_what_is_no_source_is_told_what_it_lacks(tmp_path):
    node = {"_target_": "ldm.data.sources.item.Reject", "name": "a", "reason": "b"}
    with pytest.raises(ConfigError, match=r"Reject has no __iter__, identity, facts: ldm.data.sources.item.Source"):
        prepare_shards({"source": node, "outputs": str(tmp_path)})
    assert all(issubclass(kind, Source) for kind in (EmojiSource, FolderSource, ShapesSource))
