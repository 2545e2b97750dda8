"""A handful of pictures: any format, captions from templates, batches that wrap, flips, and what is said of them."""

import json
from collections import Counter
from pathlib import Path

import few
import numpy as np
import pytest
import torch
import yaml
from commands import metrics
from PIL import Image
from tiny_training import CONF, Killed, Spy, config, fingerprint, train_watched

from ldm.checkpoints.folder import all_folders
from ldm.checkpoints.load import load_any
from ldm.config.check import check
from ldm.data.datamodule import ShardDataModule
from ldm.data.shards.splits import open_split, split_names
from ldm.data.shards.writer import write_dataset
from ldm.data.sources.folder import FolderSource
from ldm.errors import ConfigError
from ldm.pictures import to_unit
from ldm.run import quoted
from ldm.tasks.work.encode import encode_shards
from ldm.tasks.work.train import train
from ldm.text.encoder import TextEncoder
from ldm.text.templates import Templates, one_caption
from ldm.training.randomness import uniform

pytestmark = pytest.mark.slow


@pytest.fixture
def data(small_base):
    """(image shards, autoencoder run, latent shards)."""
    return tuple(small_base.parent / name for name in ("shards", "autoencoder", "latents"))


@pytest.fixture
def read(monkeypatch) -> list[list[str]]:
    """Every batch of captions that a text encoder is given."""
    seen: list[list[str]] = []
    encode = TextEncoder.encode

    def spied(self, captions, clip_skip=0):
        seen.append(list(captions))
        return encode(self, captions, clip_skip)

    monkeypatch.setattr(TextEncoder, "encode", spied)
    return seen


# --- templates


@pytest.mark.parametrize(("name", "least"), [("object", 20), ("style", 15)])
def test_the_lists_of_templates_are_whole(name, least):
    node = yaml.safe_load((CONF / f"templates/{name}.yaml").read_text())
    made = Templates(node["texts"], "sks dog", node["learns"], node["usual"])
    assert len(set(node["texts"])) == len(node["texts"]) >= least
    assert len(set(made.all([]))) == len(node["texts"]) and all("sks dog" in text for text in made.all([]))


def test_templates_are_filled_in_one_pass_and_drawn_evenly():
    made = Templates(["a photo of a {}", "{caption}, a {}", "{} and {}"], "b{caption}d")
    # Braces in a subject or a caption are text.
    assert made.drawn(["x", "o{}n", "z"], [0.1, 0.5, 0.9]) == [
        "a photo of a b{caption}d",
        "o{}n, a b{caption}d",
        "b{caption}d and b{caption}d",
    ]
    assert made.needs_captions and not one_caption("a {} dog").needs_captions
    assert one_caption("a {} dog, {caption}").first(["x", "y"]) == ["a {} dog, {caption}"] * 2
    counts = Counter(made.drawn([""] * 3000, uniform(0, "template", 1, range(3000)).tolist()))
    assert min(counts.values()) > 900 and max(counts.values()) < 1100


@pytest.mark.parametrize(
    ("texts", "subject", "words"),
    [
        (["a photo"], "dog", "has no {}"),
        (["a {} in {place}"], "dog", "{place}, which stands for nothing"),
        ([], "dog", "holds no template"),
        (["a {}"], None, "give subject="),
    ],
)
def test_templates_that_cannot_be(texts, subject, words):
    with pytest.raises(ConfigError, match=words):
        Templates(texts, subject)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["templates=object"], "give subject="),
        (["subject=dog"], "add templates=object"),
        (["templates=object", "subject=dog", "instance_prompt=x"], "leave one of them out"),
    ],
)
def test_captions_that_cannot_be_are_refused_before_anything_is_read(overrides, words):
    with pytest.raises(ConfigError, match=words):
        train(few.composed("finetune", "checkpoint=nowhere", "images=nowhere", *overrides))


def test_free_text_needs_no_quotes():
    text, keys = "a dog, 50 % of it's {size} = [big]", ("subject", "instance_prompt", "class_prompt")
    read = few.composed("dreambooth", *(quoted(f"{key}={text}", multirun=False) for key in keys))
    assert [read[key] for key in keys] == [text] * 3


def test_training_draws_captions_by_step_and_position_and_resumes_exactly(data, tmp_path, monkeypatch, read):
    overrides = [f"shards={data[2]}", "templates=object", "subject=sks star", "max_steps=4", "caption_dropout=0.0"]
    quiet = ["callbacks.samples.every_n_steps=4", "callbacks.jump_to_x0=null", "callbacks.validation.every_n_steps=4"]
    settings = config(*overrides, "callbacks.checkpoints.every_n_steps=2", "accumulate=2", *quiet)
    train_watched(settings, tmp_path / "whole", monkeypatch, Spy())
    texts = settings["templates"]["texts"]
    u = [uniform(0, "template", step, [2 * k, 2 * k + 1]).tolist() for step in range(4) for k in (0, 1)]
    expected = [[texts[int(x * len(texts))].replace("{}", "sks star") for x in pair] for pair in u]
    trained = [captions for captions in read if captions in expected]
    assert trained == expected and len({c for pair in expected for c in pair}) > 8
    # Everything else that was read is the first template (validation, pictures) or the empty caption of guidance.
    assert {c for captions in read for c in captions} <= {c for pair in expected for c in pair} | {
        "a photo of a sks star",
        "",
    }
    with pytest.raises(Killed):
        train_watched(settings, tmp_path / "run", monkeypatch, Spy(die_at=("backward", 3)))
    train_watched(settings, tmp_path / "run", monkeypatch, Spy())
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    ends = [fingerprint(all_folders(tmp_path / name)[-1]) for name in ("run", "whole")]
    assert ends[0] == ends[1]
    # Another subject is another run.
    with pytest.raises(ConfigError, match="templates"):
        train_watched(
            {**settings, "templates": {**settings["templates"], "subject": "dog"}}, tmp_path / "run", monkeypatch, Spy()
        )


# --- pictures


def sides(width: int = 48, height: int = 32) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (200, 40, 40))
    image.paste((40, 40, 200), (width // 2, 0, width, height))
    return image


def saved(path: Path, image: Image.Image, **options) -> None:
    image.save(path, **options)


def test_every_format_is_read_upright_and_in_its_colours(tmp_path):
    colours, upright = sides(), sides().transpose(Image.Transpose.ROTATE_90)  # EXIF 6: the camera was turned
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.png", "c.webp", "d.gif", "e.bmp", "f.tiff", "g.avif", "h.TIF", "i.jfif"):
        saved(tmp_path / name, colours, **({"quality": 95} if name[-3:] in ("jpg", "fif") else {}))
    for name in ("r.jpg", "s.png", "t.webp", "u.tiff", "v.avif"):
        saved(tmp_path / name, upright, exif=exif)
    alpha = colours.convert("RGBA")
    alpha.paste((0, 0, 0, 0), (8, 0, 40, 8))  # what is transparent is white
    saved(tmp_path / "w.png", alpha)
    saved(tmp_path / "x.jpg", colours.convert("CMYK"))
    grey = {}
    for name, picture in {
        "y.png": Image.new("L", (48, 32), 117),
        "z.png": Image.fromarray(np.full((32, 48), 117 * 257, np.uint16)),
        "zz.tiff": Image.fromarray(np.full((32, 48), 117 * 257, np.uint16)),
    }.items():
        saved(tmp_path / name, picture)
        grey[name] = (117, 117, 117)
    written = write_dataset(FolderSource(str(tmp_path), uncaptioned=True), tmp_path / "shards")
    assert written.samples == {"train": 19} and not written.rejected
    loader = ShardDataModule(str(tmp_path / "shards"), 32, 19, shuffle=False).train_dataloader()
    (batch,) = loader
    order = sorted(p.name for p in tmp_path.glob("*.*") if p.is_file())
    for name, image in zip(order, batch["image"], strict=True):
        left, right = (image[:, 16, x].tolist() for x in (4, 27))
        wanted = (grey[name], grey[name]) if name in grey else ((200, 40, 40), (40, 40, 200))
        assert np.allclose([left, right], wanted, atol=20), (name, left, right)
        assert (image[:, :6, 4:28] == 255).all() == (name == "w.png")


def test_few_pictures_are_all_trained_on_and_validated_on(tmp_path):
    for n in (1, 3, 8, 24, 30):
        written = write_dataset(
            FolderSource(str(few.make_pictures(tmp_path / f"{n}", n)), uncaptioned=True), tmp_path / f"d{n}"
        )
        data = ShardDataModule(str(tmp_path / f"d{n}"), 32, 4)
        held_out = 1 if n == 30 else 0
        assert written.samples == ({"train": n - 1, "val": 1} if held_out else {"train": n})
        assert (data.n_train, data.n_val) == ((n - 1, 1) if held_out else (n, n))
        assert data.validates_on_training is not bool(held_out)
        assert len(data.first_validation(2)["caption"]) == min(2, data.n_val)
        assert sum(int(b["valid"].sum()) for b in data.val_dataloader()) == data.n_val
    assert split_names(tmp_path / "d3") == ["train"] and split_names(tmp_path / "d30") == ["train", "val"]
    # A share that is asked for is held out, also of few.
    source = FolderSource(str(tmp_path / "8"), uncaptioned=True, validation_fraction=0.25)
    assert write_dataset(source, tmp_path / "quarter").samples == {"train": 6, "val": 2}
    assert len(open_split(tmp_path / "d8", "val", 0.25)) == 2


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    """Four from three: passes follow without a gap, so each picture comes equally often; a resume is exact."""
    write_dataset(FolderSource(str(few.make_pictures(tmp_path / "p", 3)), uncaptioned=True), tmp_path / "d")

    def loader():
        return ShardDataModule(str(tmp_path / "d"), 32, 4, accumulate=2).train_dataloader()

    whole, keys = loader(), []
    for _ in range(3):  # 3 epochs of one step of 2 x 4: 24 places, 8 passes
        batches = list(whole)
        assert [len(b["key"]) for b in batches] == [4, 4]
        keys += [k for b in batches for k in b["key"]]
    assert set(Counter(keys).values()) == {8}
    assert all(len(set(keys[i : i + 3])) == 3 for i in range(0, 24, 3))
    half, again = loader(), loader()
    list(half), next(iter(half))
    again.load_state_dict({**half.state_dict(), "batches": 1})
    rest = [k for b in again for k in b["key"]]
    assert rest == keys[12:16]


def test_flips_of_latents_are_latents_of_flips(data, tmp_path):
    shards, autoencoder, plain = data
    settings = config(f"shards={shards}", f"checkpoint={autoencoder}", "data.flip=true")
    flipped = encode_shards(settings, tmp_path / "flipped").output
    parts = load_any(autoencoder)
    images = ShardDataModule(str(shards), 32, 24, shuffle=False)._first(open_split(shards, "train"), 24)["image"]
    with torch.no_grad():
        upright, mirrored = (parts.autoencoder.eval().encode(to_unit(x)).moments() for x in (images, images.flip(-1)))
    assert (mirrored - upright.flip(-1)).abs().max() > 1e-3  # which is why they are stored
    loader = ShardDataModule(str(flipped), 32, 24, flip=True, shuffle=False).train_dataloader()
    seen = Counter()
    for _ in range(3):
        (batch,) = loader
        for i, latent in zip(batch["index"], batch["latent"], strict=True):
            errors = [(latent - x[i]).abs().max().item() for x in (upright, mirrored)]
            assert min(errors) < 2e-2
            seen[errors[1] < errors[0]] += 1
    assert seen[True] > 20 and seen[False] > 20
    # The upright ones are what they were, and without mirrored ones a flip is refused.
    firsts = [ShardDataModule(str(p), 32, 4)._first(open_split(p, "train"), 4)["latent"] for p in (plain, flipped)]
    assert torch.equal(*firsts)
    with pytest.raises(ConfigError, match=r"task=encode data\.flip=true"):
        ShardDataModule(str(plain), 32, 4, flip=True).train_dataloader()


# --- through experiment=finetune


def test_bare_pictures_and_one_prompt(small_base, tmp_path, read, capsys):
    """Three pictures, one of them broken beside them, in batches of four."""
    pictures = few.make_pictures(tmp_path / "p", 3)
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    out = few.run(
        *("finetune", small_base, tmp_path / "outputs", f"images={pictures}", "batch_size=4", "caption_dropout=0.0"),
        *("instance_prompt=a photo of sks star", "data.flip=true"),
    )
    assert {c for captions in read for c in captions} == {"a photo of sks star"}
    said = capsys.readouterr().out
    assert "rejected 1: undecodable image (first: broken.jpg)" in said
    assert "3 pictures: all are trained on, and validation looks at the same ones" in said
    assert "warning: 3 pictures of a subject; 5 to 8 are usual" in said
    rows = metrics(out)
    assert set(rows) == {1, 2, 3} and rows[3]["val/loss"] > 0
    identity = json.loads((out / "run.json").read_text())["identity"]
    assert identity["templates"] == {"texts": ["{}"], "subject": "a photo of sks star"}
    with pytest.raises(ConfigError, match="another configuration"):
        few.run(
            "finetune", small_base, tmp_path / "outputs", f"images={pictures}", "batch_size=4", "instance_prompt=a dog"
        )


def test_a_style_wants_twenty_and_a_single_picture_trains(small_base, tmp_path, capsys):
    pictures = few.make_pictures(tmp_path / "p", 1)
    given = [f"images={pictures}", "templates=style", "subject=zwx", "max_steps=1"]
    few.run("finetune", small_base, tmp_path / "outputs", *given)
    said = capsys.readouterr().out
    assert "warning: 1 picture of a style; 20 to 50 are usual" in said and "1 picture: all are trained on" in said
    given = [f"images={few.make_pictures(tmp_path / 'five', 5)}", "instance_prompt=sks", "max_steps=1"]
    few.run("finetune", small_base, tmp_path / "outputs", *given, name="five")
    assert "warning" not in capsys.readouterr().out


def test_pictures_without_captions_name_the_ways_out(small_base, tmp_path):
    pictures, outputs = few.make_pictures(tmp_path / "p", 4), tmp_path / "outputs"
    ways = r"4 x no caption.*NAME\.txt beside NAME\.jpg.*instance_prompt=.*templates=object"
    with pytest.raises(ConfigError, match=ways) as refused:
        few.run("finetune", small_base, outputs, f"images={pictures}")
    assert "\n" not in str(refused.value)
    # Templates that hold the captions need them too.
    with pytest.raises(ConfigError, match=ways):
        given = ["templates=object", "subject=dog", "templates.texts=['a {}, {caption}']"]
        few.run("finetune", small_base, outputs, f"images={pictures}", *given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no pictures \(avif, bmp"):
        few.run("finetune", small_base, outputs, f"images={tmp_path / 'empty'}", "instance_prompt=x")


def test_the_configuration_checks_its_numbers():
    with pytest.raises(ConfigError, match=r"num_class_images=0: must be at least 1. prior_weight=-1.0: must be"):
        check(few.composed("dreambooth", "num_class_images=0", "prior_weight=-1"))
