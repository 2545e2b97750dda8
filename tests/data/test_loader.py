"""Loaders: an epoch is a function of (seed, epoch, geometry); a resumed run sees what the uninterrupted one saw."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from loader_data import dataset, encoded, keys, loader, module
from PIL import Image

from ldm.data.check import check_dataset
from ldm.data.datamodule import ShardDataModule
from ldm.data.order import Geometry, epoch_order, order
from ldm.data.samples import sequential
from ldm.data.shards.splits import open_shards, open_split
from ldm.errors import ConfigError


def test_order_is_fixed_for_ever():
    assert order(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert order(-1, 3, 5).tolist() == order(2**64 - 1, 3, 5).tolist() != order(-1, 4, 5).tolist()


def test_a_batch_holds_what_it_says(fifty: Path):
    for batch in loader(fifty):
        assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous()
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"] == [int(k) for k in batch["key"]]
        assert batch["caption"] == [f"picture {i}" for i in batch["index"]]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_order_does_not_depend_on_threads(fifty: Path, threads: int):
    assert keys(loader(fifty, threads=threads)) == keys(loader(fifty, threads=2, prefetch=1))


def test_two_ranks_are_one_rank_accumulating_two(fifty: Path):
    for _ in range(2):
        ranks = [loader(fifty, rank, 2, 4) for rank in (0, 1)]
        single = loader(fifty, 0, 1, 4, accumulate=2)
        assert len(single) == 2 * len(ranks[0]) == 2 * len(ranks[1]) == 12
        woven = [batch for pair in zip(*map(keys, ranks), strict=True) for batch in pair]
        assert woven == keys(single)


def test_epochs_differ_cover_and_never_repeat_within(fifty: Path):
    train = loader(fifty, batch_size=5)
    first, second = ([k for batch in keys(train) for k in batch] for _ in range(2))
    assert first != second and len(set(first)) == len(set(second)) == 50 and train.epoch == 1


def test_seeds_differ(fifty: Path):
    assert keys(loader(fifty, seed=1)) != keys(loader(fifty, seed=2))
    assert [k for b in keys(loader(fifty, shuffle=False)) for k in b] == [f"{i:09d}" for i in range(48)]


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (3, 4), (5, 16), (4, 4)])
def test_a_small_folder_fills_its_batches_evenly(tmp_path: Path, n: int, batch_size: int):
    path = dataset(tmp_path / "d", n)
    train = loader(path, batch_size=batch_size)
    assert len(train) == 1
    seen = [i for _ in range(n) for batch in train for i in batch["index"]]
    assert np.bincount(seen, minlength=n).tolist() == [batch_size] * n


def test_epoch_order_of_a_small_set_is_a_stretch_of_one_stream():
    stream = np.concatenate([order(7, p, 5) for p in range(8)])
    indices, passes = (np.concatenate(x) for x in zip(*(epoch_order(7, e, 5, 8) for e in range(5)), strict=True))
    assert indices.tolist() == stream.tolist() and passes.tolist() == np.repeat(np.arange(8), 5).tolist()


BAD = {
    "broken": ({"png": b"\x89PNG\r\n\x1a\n broken", "txt": b"x"}, "undecodable image"),
    "truncated": ({"png": encoded(Image.effect_noise((64, 64), 50))[:900], "txt": b"x"}, "undecodable image"),
    "empty": ({"png": b"", "txt": b"x"}, "undecodable image"),
    "no caption": ({"png": encoded(Image.new("RGB", (8, 8)))}, "no caption"),
    "no image": ({"txt": b"x"}, "no image"),
    "not UTF-8": ({"png": encoded(Image.new("RGB", (8, 8))), "txt": b"caf\xe9"}, "caption is not UTF-8"),
    "bad json": ({"png": encoded(Image.new("RGB", (8, 8))), "json": b"{"}, "unreadable json"),
    "pixel bomb": ({"png": encoded(Image.new("1", (9000, 9000))), "txt": b"x"}, "too many pixels"),
    "not a picture": ({"png": b"GIF89a" + bytes(50), "txt": b"x"}, "undecodable image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_replaced_and_counted(kind: str, tmp_path: Path, caplog):
    fields, reason = BAD[kind]
    path = dataset(tmp_path / "d", 40, {7: fields, 9: fields})
    good, train = loader(dataset(tmp_path / "good", 40)), loader(path)
    again = loader(path, threads=0, prefetch=0)
    batches, clean = list(train), keys(good)
    assert keys(batches) == keys(again)
    assert train.batches.errors.counts == {reason: 2} and caplog.text.count("replaced by another") >= 1
    flat, other = list(chain(*keys(batches))), list(chain(*clean))
    changed = [b for a, b in zip(flat, other, strict=True) if a != b]
    assert sorted(changed) == ["000000007", "000000009"] and not {"000000007", "000000009"} & set(flat)
    assert all(len(batch["caption"]) == len(batch["image"]) == 4 for batch in batches)


def test_replacements_do_not_depend_on_ranks(tmp_path: Path):
    path = dataset(tmp_path / "d", 40, {i: {"txt": b""} for i in (3, 8, 30)})
    woven = [b for pair in zip(*(keys(loader(path, r, 2)) for r in (0, 1)), strict=True) for b in pair]
    assert woven == keys(loader(path, accumulate=2))


def test_too_many_bad_samples_stop_the_run(tmp_path: Path):
    path = dataset(tmp_path / "d", 40, {i: {"png": encoded(Image.new("L", (8, 8)))} for i in range(12)})
    with pytest.raises(ConfigError, match=r"no caption: 1[12].*present: png"):
        for _ in range(2):
            list(loader(path))
    with pytest.raises(ConfigError, match=r"\d+ bad samples of \d+ seen, 0 allowed"):
        list(loader(path, max_bad=0))
    train = loader(path, max_bad=12)
    for _ in range(3):
        list(train)
    assert train.batches.errors.bad == 12  # not counted again each epoch


def test_validation_sees_every_sample_once_on_any_number_of_ranks(fifty: Path):
    for world in (1, 2, 3):
        seen = []
        for rank in range(world):
            data = module(fifty, 4, validation_fraction=0.22)
            data._place = lambda rank=rank, world=world: (rank, world)
            val = data.val_dataloader()
            assert len(val) == -(-11 // (4 * world))
            batches = list(val)
            assert keys(batches) == keys(val) and all(len(b["key"]) == 4 for b in batches)
            seen += [k for b in batches for k, ok in zip(b["key"], b["valid"].tolist(), strict=True) if ok]
        shards = open_split(fifty, "val", 0.22)
        assert sorted(seen) == [shards.index.key(i) for i in range(11)] and len(seen) == 11


def test_stream_mode_reads_with_webdataset_and_resumes(tmp_path: Path):
    path = dataset(tmp_path / "d", 40)

    def stream(rank=0, world=1, accumulate=1):
        options = {"mode": "stream", "epoch_samples": 40}
        return loader(path, rank, world, accumulate=accumulate, **options)

    train = stream()
    first, second = keys(train), keys(train)
    assert len(first) == 10 and first != second and len(set(chain(*first))) == 40
    again = stream()
    running = iter(again)
    for _ in range(4):
        next(running)
    resumed = stream()
    resumed.load_state_dict(again.state_dict())
    assert keys(resumed) == first[4:] and keys(resumed) == second
    ranks = [keys(stream(r, 2)) for r in (0, 1)]
    assert [b for pair in zip(*ranks, strict=True) for b in pair] == first
    with pytest.raises(ConfigError, match="plain https"):
        ShardDataModule("pipe:touch /tmp/x", 8, 4, mode="stream", epoch_samples=4).train_dataloader()
    with pytest.raises(ConfigError, match="plain https"):
        ShardDataModule("http://x/'; touch y '.tar", 8, 4, mode="stream", epoch_samples=4).train_dataloader()
    assert module(path, mode="stream", epoch_samples=40, validation_fraction=0.1).val_dataloader() == []


def test_datamodule_answers(fifty: Path, tmp_path: Path):
    data = module(fifty, validation_fraction=0.1)
    assert (data.n_train, data.n_val, data.kind) == (45, 5, "image") and len(data.fingerprint) == 64
    assert sorted(data.captions()) == sorted(f"picture {int(k)}" for k in data.split("train").index.keys)
    assert data.train_dataloader() is data.train_dataloader()
    assert module(fifty, train_samples=8).n_train == 8
    for path, words in ((None, "type shards=PATH"), (str(tmp_path / "none"), "task=prepare")):
        with pytest.raises(ConfigError, match=words):
            ShardDataModule(path, 8, 4).setup("fit")
    for wrong in ({"mode": "x"}, {"crop": "x"}, {"resume": "x"}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            loader(fifty, **wrong)


def test_webdatasets_stages_do_the_mapping(fifty: Path):
    batches = loader(fifty).batches
    pipeline = batches.samples([1, 2], [0, 0])
    assert [sample["__index__"] for sample in pipeline] == [1, 2]
    assert Geometry(4).batches(50) == 12 and isinstance(wds.DataPipeline([1]), torch.utils.data.IterableDataset)


def test_sequential_gives_every_good_sample_once_and_names_the_others(tmp_path: Path):
    path = dataset(tmp_path / "d", 20, {7: {"txt": b""}, 8: {"png": b"x", "txt": b""}})
    found = list(sequential(open_shards(path), 8, 3))
    assert [int(k) for batch, _ in found for k in batch["key"]] == [i for i in range(20) if i not in (7, 8)]
    assert [bad.key[-2:] for _, bads in found for bad in bads] == ["07", "08"]


def test_threads_leave_the_main_thread_alone(fifty: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        list(loader(fifty))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_check_lists_everything_that_is_wrong(tmp_path: Path):
    path = dataset(tmp_path / "d", 40, {7: {"txt": b""}, 30: {"png": b"x", "txt": b""}})
    report = check_dataset(str(path))
    assert report.samples == {"": 40} and report.reasons == {"no image": 1, "undecodable image": 1} and not report.ok
    assert [bad["key"] for bad in report.bad] == ["000000007", "000000030"] and "NOT sound" in str(report)
    sound = dataset(tmp_path / "sound", 20)
    assert check_dataset(str(sound)).ok
    with open(sound / "00000.tar", "r+b") as file:  # a flipped bit in a caption, which no header notices
        file.seek(3 * 512)
        file.write(b"P")
    assert "sha256" in check_dataset(str(sound)).damaged[0]
    (sound / "00000.tar").unlink()
    assert "is missing" in str(check_dataset(str(sound)))
