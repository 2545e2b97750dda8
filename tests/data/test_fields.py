"""What of a sample is its picture and what its caption; who needs none goes without one."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from commands import here
from PIL import Image
from tiny_training import config

import ldm.tasks.work.evaluate as evaluating
from ldm.data.captions import SampleError
from ldm.data.check import check_dataset
from ldm.data.datamodule import ShardDataModule
from ldm.data.fields import Fields, read_fields
from ldm.data.shards.reader import IndexedShards
from ldm.data.shards.splits import open_shards, open_split, split_names
from ldm.errors import ConfigError
from ldm.evaluation.drawing import captions_of, image_shards
from ldm.tasks.work.encode import encode_shards
from ldm.tasks.work.evaluate import evaluate_run
from ldm.training.run.fit import train_run


def picture(value: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 36), (value, 0, 0)).save(file, format)
    return file.getvalue()


def pack(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for i, fields in enumerate(samples):
            for name, data in fields.items():
                info = tarfile.TarInfo(f"s{i:05d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def classes(folder: Path, n: int = 12) -> Path:
    """ImageNet as webdataset: jpg and the number of the class."""
    return pack(folder, [{"jpg": picture(i, "JPEG"), "cls": f"{i % 3}\n".encode()} for i in range(n)])


def bare(folder: Path, n: int = 12) -> Path:
    return pack(folder, [{"png": picture(i)} for i in range(n)])


def captions(path: Path, **options) -> list[str]:
    return list(ShardDataModule(str(path), 32, 2, validation_fraction=0, **options).captions())


def sample(**fields) -> dict:
    return {"__key__": "k", **{name.replace("_", "."): data for name, data in fields.items()}}


def test_a_class_is_a_caption_and_its_name_stands_in_a_file(tmp_path):
    path = classes(tmp_path / "d", 4)
    assert captions(path) == ["0", "1", "2", "0"]
    (tmp_path / "names.txt").write_text("tench\ngreat white shark\ntench\n", "utf-16")
    assert captions(path, class_names=str(tmp_path / "names.txt")) == ["tench", "great white shark", "tench", "tench"]
    named = pack(tmp_path / "named", [{"jpg": b"", "cls": b"a goldfish"}])
    assert captions(named) == captions(named, class_names=str(tmp_path / "names.txt")) == ["a goldfish"]
    fields = Fields(class_names=("a", "b"), caption=("cls", "json:label"))
    for number in (b"2", b"-1", b"99999999999999999999"):
        with pytest.raises(SampleError, match="the names are of 0 to 1"):
            fields.caption_of(sample(cls=number))
    assert fields.caption_of(sample(json=b'{"label": 1}')) == "b"


def test_fields_in_order_of_preference():
    full = sample(txt=b"text", json=b'{"caption": "c", "text": "t", "long one": "l"}', cls=b"3", a_txt=b"dotted")
    for chosen, expected in {
        (): "text",
        ("json:text", "txt"): "t",
        ("json:none", "json:long one"): "l",
        ("cls", "txt"): "3",
        ("a.txt",): "dotted",
        ("TXT",): "text",
    }.items():
        assert read_fields({"caption": list(chosen) or None}).caption_of(full) == expected
    assert read_fields({"caption": []}).caption_of({}) == "", "no captions are wanted"
    assert Fields().optional().caption_of(sample(json=b'{"caption": null}')) is None
    images = sample(jpg=b"a", seg_png=b"b")
    assert Fields().picture_of(images) == b"a" and read_fields({"image": "seg.png"}).picture_of(images) == b"b"
    with pytest.raises(SampleError, match=r"no image \(data.fields.image: webp\); present: jpg, seg.png"):
        read_fields({"image": ["webp"]}).picture_of(images)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"json": b'{"caption": 7}'}, "caption is not text"),
        ({"json": b'{"caption": ["a", null]}'}, "caption is not text"),
        ({"json": b'{"caption": "\\udce9"}'}, "caption is not UTF-8"),
        ({"json": b'{"caption": "a", "caption": "b"}'}, "unreadable json"),
        ({"json": b"[]"}, "unreadable json"),
        ({"json": b'{"caption": null}'}, "no caption"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
        ({"cls": b"\x00\x01"}, "caption is not UTF-8"),
        ({"jpg": b""}, "no caption"),
    ],
)
def test_what_is_no_caption_is_counted_by_its_reason(fields, reason):
    with pytest.raises(SampleError) as caught:
        Fields().caption_of(sample(**fields))
    assert caught.value.reason == reason
    str(caught.value).encode()
    assert Fields().unread().caption_of(sample(**fields)) == ""


def test_another_entry_may_hold_the_text():
    assert Fields().caption_of(sample(json=b'{"caption": 7, "text": "t"}')) == "t"
    several = sample(json=b'{"caption": ["a", "b", "c"]}') | {"__index__": 0}
    assert Fields().caption_of(several) == "a"
    assert {Fields().caption_of(several | {"__epoch__": epoch}) for epoch in range(30)} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"capton": ["txt"]}, "data.fields.capton: there is"),
        ({"image": []}, "name one"),
        ({"image": ["json:x"]}, "a picture is a member by itself"),
        ({"caption": ["json:"]}, "is no field"),
        ({"caption": ["a/b"]}, "is no field"),
        ({"caption": [""]}, "is no field"),
    ],
)
def test_fields_that_cannot_be(node, words):
    with pytest.raises(ConfigError, match=words):
        read_fields(node)


def test_dots_in_names_are_fields_as_webdataset_has_them(tmp_path):
    path = pack(tmp_path / "d", [{"png": picture(i), "seg.png": picture(100 + i), "txt": b"t"} for i in range(3)])
    for image, red in (("png", 0), ("seg.png", 100)):
        data = ShardDataModule(str(path), 8, 3, validation_fraction=0, shuffle=False, fields={"image": [image]})
        assert next(iter(data.train_dataloader()))["image"][:, 0, 0, 0].tolist() == [red, red + 1, red + 2]
    only = pack(tmp_path / "only", [{"seg.png": picture(7), "txt": b"t"}] * 2)
    for read in (open_shards, open_split, split_names, check_dataset):
        if read is check_dataset:
            assert "data.fields.image=[seg.png]" in check_dataset(str(only)).damaged[0]
            assert check_dataset(str(only), fields=read_fields({"image": "seg.png"})).ok
            continue
        with pytest.raises(ConfigError, match=r"'s00000.seg.png'.*data.fields.image=\[seg.png\]"):
            read(only)
        read(only, fields=read_fields({"image": "seg.png"}))
    theirs = wds.DataPipeline(wds.SimpleShardList([str(only / "000000.tar")]), wds.tarfile_to_samples())
    assert list(IndexedShards(open_shards(only, read_fields({"image": "seg.png"})))) == list(theirs)


def test_another_choice_is_another_data_set(tmp_path):
    path = classes(tmp_path / "d")
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"{name}\nb\nc\n")
    choices = [{}, {"fields": {"image": ["jpg"]}}, {"fields": {"caption": ["cls"]}}]
    choices += [{"class_names": str(tmp_path / name)} for name in ("one", "two")]
    marks = [ShardDataModule(str(path), 32, 2, **choice).fingerprint for choice in choices]
    assert len(set(marks)) == 5
    usual = {"image": ["jpg", "jpeg", "png", "webp", "bmp"], "caption": ["txt", "json:caption", "json:text", "cls"]}
    assert ShardDataModule(str(path), 32, 2, fields=usual).fingerprint == marks[0] == open_split(path).fingerprint
    assert config()["data"]["fields"] == usual


def test_check_counts_what_has_no_caption_and_names_what_is_none(tmp_path):
    report = check_dataset(str(bare(tmp_path / "bare", 5)))
    assert report.ok and report.without_caption == 5 and "5 samples without a caption" in str(report)
    broken = pack(tmp_path / "broken", [{"png": picture(1), "txt": b"\xff"}, {"png": picture(2), "txt": b"ok"}])
    report = check_dataset(str(broken))
    assert not report.ok and dict(report.reasons) == {"caption is not UTF-8": 1} and report.without_caption == 0
    done = here("task=check", f"shards={broken}", "data.fields.caption=[json:a, cls]", cwd=tmp_path)
    assert done.returncode == 0 and "2 samples without a caption" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """An autoencoder trained on pictures without captions, and what it makes of three data sets."""
    top = tmp_path_factory.mktemp("stages")
    bad = [{"png": picture(i), "txt": b"\xff not text"} for i in range(12)]
    sets = {"bare": bare(top / "bare"), "classes": classes(top / "classes"), "bad": pack(top / "bad", bad)}
    settings = ["module=autoencoder", "image_size=32", "max_steps=2", "data.validation_fraction=0"]
    for name, path in sets.items():
        found = train_run(config(*settings, f"shards={path}"), lambda digest, name=name: top / f"autoencoder-{name}")
        assert found.step == 2
    some = [{"png": picture(i), **({} if i % 4 == 3 else {"txt": b"a text"})} for i in range(12)]
    sets["some"] = pack(top / "some", some)
    (top / "names").write_text("a cat\na dog\na bird\n")
    for name, options in (
        ("bare", []),
        ("classes", [f"data.class_names={top}/names"]),
        ("some", []),
        ("bad", []),
    ):
        given = config(
            f"shards={sets[name]}", f"checkpoint={top}/autoencoder-bare", "data.validation_fraction=0", *options
        )
        if name == "bad":
            with pytest.raises(ConfigError, match=r"12 rejected\. 12 x caption is not UTF-8"):
                encode_shards(given, top / f"latents-{name}")
        else:
            sets[f"latents-{name}"] = encode_shards(given, top / f"latents-{name}").output
    return sets | {"top": top}


def test_latents_carry_what_captions_there_were(stages):
    assert open_shards(stages["latents-bare"]).fields == ("latent.npy",)
    assert captions(stages["latents-classes"]) == ["a cat", "a dog", "a bird"] * 4
    data = ShardDataModule(str(stages["latents-some"]), 32, 2, validation_fraction=0)
    assert (data.n_train, list(data.captions())) == (9, ["a text"] * 9)
    data = ShardDataModule(str(stages["latents-some"]), 32, 2, validation_fraction=0)
    data.captions_read = False
    assert data.n_train == 12 and set(next(iter(data.train_dataloader()))["caption"]) == {""}


def test_text_wants_captions_and_says_so_before_anything_is_trained(stages, tmp_path):
    for name, words in (("bare", "present: png"), ("latents-bare", "encode the images again with data.fields.caption")):
        given = config(f"shards={stages[name]}", f"checkpoint={stages['top']}/autoencoder-bare", "image_size=32")
        with pytest.raises(ConfigError) as caught:
            train_run(given, lambda digest: tmp_path / "run")
        for word in (words, "data.fields.caption=", "text_encoder=none", "instance_prompt="):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    typed = ("experiment=quickstart", "debug=fast_dev_run", f"shards={stages['bare']}", "logger=none")
    result = here(*typed, cwd=tmp_path)
    assert result.returncode == 2 and "data.fields.caption=" in result.stderr and "---" not in result.stdout
    assert not (tmp_path / "outputs").exists()


def test_without_text_no_captions_are_wanted(stages, tmp_path):
    plain = ["text_encoder=none", "model.cross_attention_dim=null", "max_steps=1", "image_size=32"]
    given = config(*plain, f"shards={stages['latents-bare']}", "data.validation_fraction=0")
    assert train_run(given, lambda digest: tmp_path / "plain").step == 1
    given = config(f"shards={stages['latents-bare']}", "instance_prompt=a photo", "max_steps=1", "image_size=32")
    assert train_run(given, lambda digest: tmp_path / "one").step == 1


def test_evaluation_reads_the_captions_chosen(stages):
    fields = read_fields(None, str(stages["top"] / "names"))
    images = image_shards(str(stages["latents-classes"]), fields)
    assert sorted(set(captions_of(images, 12, 0)["val"])) == ["a bird", "a cat", "a dog"]
    assert captions_of(image_shards(str(stages["bare"]), Fields()), 3, 0) == {"val": [""] * 3}


def test_evaluation_looks_at_what_the_training_held_out(stages, tmp_path, monkeypatch):
    """Pictures and captions of another share would be some that were trained on."""
    given = ["module=autoencoder", "image_size=32", "max_steps=1", f"shards={stages['classes']}"]
    asked = config(*given, "data.validation_fraction=0.5")
    run = train_run(asked, lambda digest: tmp_path / "run").path
    seen = {}

    class Spy:
        def score(self, evaluation):
            return seen.update({split: sum(map(len, evaluation.real(split, None))) for split in evaluation.splits})

    monkeypatch.setattr(evaluating, "built_metrics", lambda node: {"metric.spy": Spy()})
    evaluate_run({**asked, "checkpoint": str(run), "shards": None, "output": None, "metric": {}})
    assert seen == {name: len(open_split(stages["classes"], name, 0.5)) for name in ("train", "val")}
    assert seen["val"] > 1
