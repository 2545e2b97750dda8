"""Shards: damage is always an error, webdataset and we read each other, and writing is deterministic and atomic."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from ldm.data.order import validation_share
from ldm.data.shards.reader import IndexedShards
from ldm.data.shards.splits import file_name, open_shards, open_split
from ldm.data.shards.tar import BLOCK, scan
from ldm.data.shards.writer import read_sidecar, write_dataset, write_manifest, write_shard
from ldm.data.sources.item import Item, Reject, image_item
from ldm.errors import ConfigError


def png(value: int = 0, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 10, 20)).save(file, "PNG")
    return file.getvalue()


def items(n: int, split: str = "train") -> list[Item]:
    return [image_item(png(i), "png", f"picture {i}", {"i": i}, split) for i in range(n)]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", **attributes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path: Path, names: list[str], **attributes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name, name.encode() * 50, **attributes)
    return path


def samples_of_webdataset(path: Path) -> list[dict]:
    pipeline = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples())
    return list(pipeline)


GOOD = ["a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"]


def cut(at: int):
    def damage(path: Path) -> None:
        os.truncate(path, at)

    return damage


def overwrite(at: int, data: bytes):
    def damage(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(data)

    return damage


def append(data: bytes):
    def damage(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(data)

    return damage


def names(*members: str, **attributes):
    def damage(path: Path) -> None:
        make_tar(path, list(members), **attributes)

    return damage


DAMAGES = {
    "cut in a header": (cut(2 * BLOCK + 100), "end-of-archive"),
    "cut at a member boundary": (cut(2 * BLOCK), "end-of-archive"),
    "cut in member data": (cut(BLOCK + 20), "ends"),
    "one end block": (cut(12 * BLOCK + BLOCK), "incomplete"),
    "noise over a header": (overwrite(4 * BLOCK, b"\x17" * 300), "checksum"),
    "changed name": (overwrite(4 * BLOCK, b"z"), "checksum"),
    "empty file": (cut(0), "empty"),
    "html": (lambda p: p.write_bytes(b"<!DOCTYPE html>" + b" " * 600), "web page"),
    "garbage": (lambda p: p.write_bytes(os.urandom(2000)), "not a tar"),
    "short garbage": (lambda p: p.write_bytes(b"hello"), "not a tar"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(600)), "gunzip"),
    "no members": (names(), "no sample"),
    "only a README": (names("README"), "no sample"),
    "two archives": (append(b"a.jpg".ljust(5000, b"\0")), "two archives"),
    "duplicate side by side": (names("a.jpg", "a.jpg"), "twice"),
    "duplicate apart": (names("a.jpg", "b.jpg", "a.jpg"), "again"),
    "interleaved": (names("a.jpg", "b.jpg", "a.txt", "b.txt"), "again"),
    "dots": (names("img.v1.jpg", "img.v2.jpg"), "dot"),
    "symbolic link": (names("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
    "hard link": (names("a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg"), "link"),
    "device": (names("a.jpg", type=tarfile.CHRTYPE), "plain file"),
    "traversal": (names("../../x.jpg"), "outside"),
    "absolute": (names("/etc/x.jpg"), "outside"),
    "control characters": (names("a\x07b.jpg"), "control"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_that_names_the_file(name: str, tmp_path: Path):
    damage, words = DAMAGES[name]
    path = make_tar(tmp_path / "00000.tar", GOOD)
    damage(path)
    with pytest.raises(ConfigError, match=words) as caught:
        open_shards(tmp_path)
    assert str(path) in str(caught.value)


def test_a_cut_anywhere_is_noticed(tmp_path: Path):
    path = make_tar(tmp_path / "a.tar", GOOD)
    whole = path.read_bytes()
    end = 12 * BLOCK + 2 * BLOCK  # what follows is filler
    for at in range(0, end, 171):
        path.write_bytes(whole[:at])
        with pytest.raises(ConfigError):
            scan(path)


def test_duplicate_keys_across_shards(tmp_path: Path):
    make_tar(tmp_path / "0.tar", GOOD)
    make_tar(tmp_path / "1.tar", ["d.jpg", "b.jpg"])
    with pytest.raises(ConfigError, match=r"'b' is also in 0\.tar"):
        open_shards(tmp_path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_reads_as_webdataset_reads_it(format: int, tmp_path: Path):
    long = "folder/" * 20
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for stem in ("./0001", long + "0002", "ünï/0003" if format != tarfile.USTAR_FORMAT else "x/0003"):
            for ext in ("jpg", "TXT", "seg.png", "json"):
                add(tar, f"{stem}.{ext}", os.urandom(700), mtime=3)
        add(tar, "README", b"text")
        add(tar, "__meta__/x.json", b"{}")
        add(tar, "folder", type=tarfile.DIRTYPE)
    shards = open_shards(tmp_path / "a.tar")
    assert list(IndexedShards(shards)) == samples_of_webdataset(tmp_path / "a.tar")


def test_webdatasets_writer_and_img2datasets_layout_read_identically(tmp_path: Path):
    for folder in ("wds", "i2d"):
        (tmp_path / folder).mkdir()
    with wds.ShardWriter(str(tmp_path / "wds/%05d.tar"), maxcount=7, verbose=0) as sink:
        for i in range(20):
            sink.write({"__key__": f"s{i:04d}", "png": png(i), "txt": f"nr {i}", "json": {"i": i}, "a.npy": np.ones(i)})
    with tarfile.open(tmp_path / "i2d/00000.tar", "w") as tar:
        for i in range(5):
            add(tar, f"00000000{i}.jpg", png(i))
            if i != 3:
                add(tar, f"00000000{i}.txt", b"a caption")
            add(tar, f"00000000{i}.json", json.dumps({"caption": "a caption", "key": f"00000000{i}"}).encode())
    (tmp_path / "i2d/00000_stats.json").write_text("{}")
    for folder in ("wds", "i2d"):
        shards = open_shards(tmp_path / folder)
        expected = [s for tar in sorted((tmp_path / folder).glob("*.tar")) for s in samples_of_webdataset(tar)]
        assert list(IndexedShards(shards)) == expected
        again = open_shards(tmp_path / folder)  # from the cached index
        assert list(IndexedShards(again)) == expected and again.fingerprint == shards.fingerprint
        order = np.random.default_rng(0).permutation(len(expected))
        assert list(IndexedShards(again, order)) == [expected[i] for i in order]


def test_webdataset_reads_ours(tmp_path: Path):
    write_dataset(items(25), tmp_path / "d", samples_per_shard=10)
    shards = open_shards(tmp_path / "d")
    assert [f.name for f in shards.files] == ["00000.tar", "00001.tar", "00002.tar"]
    assert list(IndexedShards(shards)) == [s for file in shards.files for s in samples_of_webdataset(file)]
    assert [s["txt"] for s in IndexedShards(shards, [24, 0])] == [b"picture 24", b"picture 0"]
    with tarfile.open(shards.files[0]) as tar:
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o644)}


def test_the_same_samples_make_the_same_bytes_wherever_and_whenever(tmp_path: Path):
    for name in ("a", "b"):
        write_dataset(items(12), tmp_path / name, samples_per_shard=5, facts={"x": 1})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*"))
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*"))
    for file in files:
        if file.name != "index.npz":  # zip members carry the time
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, b = open_shards(tmp_path / "a"), open_shards(tmp_path / "b")
    assert a.fingerprint == b.fingerprint and a.facts == {"x": 1}
    write_dataset(items(13), tmp_path / "c")
    assert open_shards(tmp_path / "c").fingerprint != a.fingerprint


def test_an_interrupted_writing_leaves_no_data_set_and_goes_on(tmp_path: Path):
    def failing():
        yield from items(12)
        raise KeyboardInterrupt

    identity = {"source": "test"}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(failing(), tmp_path / "d", samples_per_shard=5, identity=identity)
    assert not (tmp_path / "d").exists()
    with pytest.raises(ConfigError, match=r"unfinished .*d\.part"):
        open_shards(tmp_path / "d")
    first = tmp_path / "d.part/train/00000.tar"
    assert read_sidecar(first) is not None
    before = first.stat().st_mtime_ns
    written = write_dataset(items(12), tmp_path / "d", samples_per_shard=5, identity=identity)
    assert (tmp_path / "d/00000.tar").stat().st_mtime_ns == before
    assert written.samples == {"train": 12} and not (tmp_path / "d.part").exists()
    assert not list((tmp_path / "d").glob("0*.json"))
    again = write_dataset(failing(), tmp_path / "d", identity=identity)
    assert again.existed and again.samples == {"train": 12}
    with pytest.raises(ConfigError, match="something else"):
        write_dataset(items(1), tmp_path / "d", identity={"source": "other"})


def test_rejects_are_counted_and_listed(tmp_path: Path):
    rejected = [Reject(f"{i}.png", "too small") for i in range(3)] + [Reject("x.png", "broken", "why")]
    written = write_dataset([*items(4), *rejected], tmp_path / "d")
    assert written.rejected == {"too small": 3, "broken": 1} and written.first["too small"] == "0.png"
    assert "rejected 3: too small (first: 0.png)" in str(written)
    assert len((tmp_path / "d/rejects.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ConfigError, match=r"nothing to write.*3 x too small"):
        write_dataset(rejected, tmp_path / "e")


@pytest.mark.parametrize("key", ["a.b", "../x", "a/b", "", "ä", "x" * 81])
def test_keys_that_readers_would_misread_are_not_written(key: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot stand in a shard"):
        write_dataset([Item({"txt": b""}, key=key)], tmp_path / "d")


def test_duplicate_keys_are_not_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="twice"):
        write_dataset([Item({"txt": b""}, key="a"), Item({"txt": b""}, key="a")], tmp_path / "d")


def test_shards_can_be_written_by_hand(tmp_path: Path):
    entries = [
        write_shard(tmp_path / f"{s:05d}.tar", [(f"{s}{i}", {"latent.npy": b"1"}) for i in range(3)]) for s in (0, 1)
    ]
    fingerprint = write_manifest(tmp_path, entries, {"parent": "p"})
    shards = open_shards(tmp_path)
    assert (len(shards), shards.kind, shards.fingerprint, shards.facts) == (6, "latent", fingerprint, {"parent": "p"})


def test_a_tar_that_is_not_as_the_manifest_says_is_refused(tmp_path: Path):
    write_dataset(items(12), tmp_path / "d", samples_per_shard=5)
    (tmp_path / "d/extra.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"extra\.tar is not in"):
        open_shards(tmp_path / "d")
    (tmp_path / "d/extra.tar").unlink()
    append(b"\0" * 512)(tmp_path / "d/00001.tar")
    with pytest.raises(ConfigError, match=r"00001\.tar: has \d+ bytes, the manifest says"):
        open_shards(tmp_path / "d")
    (tmp_path / "d/00001.tar").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        open_shards(tmp_path / "d")
    (tmp_path / "d/manifest.json").write_text('{"format": 1, "shards": [{"file": "../../etc/passwd", "bytes": 1}]}')
    with pytest.raises(ConfigError, match="unreadable"):
        open_shards(tmp_path / "d")


@pytest.mark.parametrize("damage", [b"", b"noise", None])
def test_a_lost_index_is_made_again(damage: bytes | None, tmp_path: Path):
    write_dataset(items(5), tmp_path / "d")
    before = list(IndexedShards(open_shards(tmp_path / "d")))
    if damage is None:
        (tmp_path / "d/index.npz").unlink()
    else:
        (tmp_path / "d/index.npz").write_bytes(damage)
    assert list(IndexedShards(open_shards(tmp_path / "d"))) == before


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("offset", lambda a: a - 10**6),
        ("offset", lambda a: a + 2**62),
        ("offset", lambda a: a.astype(str)),
        ("size", lambda a: a + 10**12),
        ("size", lambda a: a - 2**20),
        ("size", lambda a: a * float("nan")),
        ("shard", lambda a: a.astype(float)),
        ("keys", lambda a: np.arange(len(a))),
        ("keys", lambda a: np.array([b"\xff%d" % i for i in range(len(a))])),
    ],
)
def test_an_index_that_points_elsewhere_is_made_again(array: str, change, tmp_path: Path):
    write_dataset(items(5), tmp_path / "d")
    before = list(IndexedShards(open_shards(tmp_path / "d")))
    with np.load(tmp_path / "d/index.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "d/index.npz", **arrays | {array: change(arrays[array])})
    assert list(IndexedShards(open_shards(tmp_path / "d"))) == before


@pytest.mark.parametrize(
    "facts",
    [[1], "x", *({"image_size": v} for v in ("x", 0, -1, 10**9, [32], True)), {"parent": [1]}]
    + [{"source": "shapes", "held_out_fraction": "x"}, {"source": "shapes"}],
)
def test_facts_that_cannot_be_are_refused(facts, tmp_path: Path):
    write_dataset(items(5), tmp_path / "d")
    path = tmp_path / "d/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"facts": facts}))
    with pytest.raises(ConfigError, match="unreadable"):
        open_shards(tmp_path / "d")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 1, "shards": [{"file": "0", "bytes": 1, "sha256": "\\ud800"}]}']
)
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path):
    write_dataset(items(5), tmp_path / "d")
    (tmp_path / "d/manifest.json").write_text(text)
    with pytest.raises(ConfigError, match="unreadable"):
        open_shards(tmp_path / "d")


def test_a_foreign_index_is_made_again_when_a_tar_changes(tmp_path: Path):
    make_tar(tmp_path / "a.tar", ["a.jpg", "b.jpg"])
    first = open_shards(tmp_path)
    make_tar(tmp_path / "a.tar", ["a.jpg", "c.jpg"], mtime=5)
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    second = open_shards(tmp_path)
    assert [second.index.key(i) for i in (0, 1)] == ["a", "c"] and first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("pipe:rm -rf /", "pipe:"),
        ("http://x/y.tar", "Download"),
        ("nothing", "task=prepare"),
        ("{0..2}.tar", "no shards at"),
    ],
)
def test_paths_that_cannot_be_read_say_what_to_type(path: str, words: str):
    with pytest.raises(ConfigError, match=words):
        open_shards(path)


def test_patterns_and_single_tars(tmp_path: Path):
    write_dataset(items(12), tmp_path / "d", samples_per_shard=5)
    assert len(open_shards(f"{tmp_path}/d/{{00000..00001}}.tar")) == 10
    assert len(open_shards(f"{tmp_path}/d/*.tar")) == 12
    assert len(open_shards(tmp_path / "d/00002.tar")) == 2


def test_splits_are_disjoint_complete_and_stable(tmp_path: Path):
    write_dataset(items(100), tmp_path / "plain")
    train, val = (open_split(tmp_path / "plain", s, 0.1) for s in ("train", "val"))
    keys = [{s.index.key(i) for i in range(len(s))} for s in (train, val)]
    assert (len(keys[0]), len(keys[1]), len(keys[0] | keys[1])) == (90, 10, 100)
    assert train.fingerprint != val.fingerprint
    write_dataset([*items(6), *items(3, "val"), *items(2, "test")], tmp_path / "split")
    assert [len(open_split(tmp_path / "split", s)) for s in ("train", "val", "test")] == [6, 3, 2]
    with pytest.raises(ConfigError, match="splits there: test, train, val"):
        open_split(tmp_path / "split", "other")
    with pytest.raises(ConfigError, match="only the splits"):
        open_shards(tmp_path / "split")


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(1, 0.5, 0), (2, 0.02, 0), (24, 0.02, 0), (26, 0.02, 1), (5, 0, 0), (100_00, 0.5, 1024), (3, 1, 2)],
)
def test_validation_share(n: int, fraction: float, expected: int):
    assert validation_share([str(i).encode() for i in range(n)], fraction).sum() == expected


def test_keys_become_harmless_file_names():
    assert (
        file_name("../../etc/passwd") == "etc_passwd"
        and file_name("./a b;c") == "a_b_c"
        and file_name("..") == "sample"
    )
