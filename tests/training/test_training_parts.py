"""Averages, sums, checkpoint folders, run directories and logs, each by itself."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.checkpoints import folder as checkpoints
from ldm.checkpoints.folder import Content
from ldm.errors import ConfigError
from ldm.training.callbacks import pictures
from ldm.training.ema import EMA
from ldm.training.learning_rate import constant, cosine
from ldm.training.run.directory import RunDirectory, differences
from ldm.training.run.logging import RunLogger
from ldm.training.run.wandb_mirror import WandbMirror
from ldm.training.totals import Totals, binned


def test_ema_is_the_recursion_and_swaps_back_after_an_error():
    p = {"w": nn.Parameter(torch.tensor([0.0]))}
    ema, expected = EMA(decay=0.9), 0.0
    ema.start(p)
    for n in range(1, 50):
        p["w"].data.fill_(float(n))
        ema.update(p)
        expected += (1 - min(0.9, (1 + n) / (10 + n))) * (n - expected)
    assert ema.shadow["w"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RuntimeError), ema.swapped(p):
        assert p["w"].item() == pytest.approx(expected, rel=1e-5)
        raise RuntimeError
    assert p["w"].item() == 49.0
    again = EMA(decay=0.9)
    again.load(ema.state(), ema.updates)
    again.start(p)
    assert torch.equal(again.shadow["w"], ema.shadow["w"]) and again.updates == 49
    with pytest.raises(ConfigError):
        EMA(decay=1.0)


def test_a_loaded_average_has_the_weights_memory_layout():
    """Or a resumed run's validation differs from the uninterrupted one's in the last digit."""
    p = {"w": nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))}
    ema, again = EMA(), EMA()
    ema.start(p)
    again.load({k: v.contiguous() for k, v in ema.state().items()}, 3)
    again.start(p)
    assert again.shadow["w"].stride() == p["w"].stride() and torch.equal(again.shadow["w"], p["w"])


def test_totals_are_exact_over_any_split():
    values, t = torch.rand(100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    whole, parts = Totals(["x", *binned("b")]), Totals(["x", *binned("b")])
    for totals, size in ((whole, 100), (parts, 7)):
        for i in range(0, 100, size):
            totals.add("x", values[i : i + size])
            totals.add_by_bin("b", values[i : i + size], t[i : i + size])
            totals.end_step()
        totals.reduce()
    torch.testing.assert_close(parts.values, whole.values)
    assert whole.means()["x"] == pytest.approx(values.mean().item())
    assert whole.standard_errors()["x"] == pytest.approx((values.std() / 10).item())
    inside = values[(t >= 0.3) & (t < 0.4)]
    assert whole.means()["b/3"] == pytest.approx(inside.mean().item())


def test_learning_rates():
    assert cosine(0, 10, 100) == 0.1 and cosine(9, 10, 100) == 1.0
    assert cosine(55, 10, 100) == pytest.approx(0.5) and cosine(100, 10, 100) == 0.0 and cosine(500, 10, 100) == 0.0
    assert constant(4, 10) == 0.5 and constant(10_000, 10) == 1.0


def content(value=1.0):
    tensors = {"w": torch.full((10,), value)}
    parts = {"unet": tensors, "vae": {"v": torch.zeros(5)}}
    return Content(parts, {"unet": {"w": tensors["w"] * 2}}, {"global_step": 3}, "module: x\n", frozen=("vae",))


def test_checkpoint_folders_are_whole_verified_and_share_what_is_frozen(tmp_path):
    first, second = (tmp_path / "checkpoints" / checkpoints.folder_name(s) for s in (3, 6))
    checkpoints.write(first, content(1.0), 3)
    checkpoints.write(second, content(2.0), 6, previous=first)
    assert os.stat(first / "vae.safetensors").st_ino == os.stat(second / "vae.safetensors").st_ino
    assert checkpoints.load_parts(second, "raw")["unet"]["w"][0] == 2.0
    assert checkpoints.load_parts(second, "ema")["unet"]["w"][0] == 4.0
    assert checkpoints.newest(tmp_path, pytest.fail) == second
    assert not list((tmp_path / "checkpoints").glob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest"])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    folder = tmp_path / "checkpoints" / checkpoints.folder_name(3)
    checkpoints.write(folder, content(), 3)
    file = folder / "unet.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    told = []
    assert checkpoints.newest(tmp_path, told.append) is None and len(told) == 1
    with pytest.raises(ConfigError, match="no usable checkpoint"):
        checkpoints.find(tmp_path)


def test_run_directories_are_locked_and_keep_their_identity(tmp_path):
    run = RunDirectory(tmp_path / "run", {"a": 1}, {"seed": 0, "model": {"width": 3}})
    run.open()
    with pytest.raises(ConfigError, match="in use by process"):
        RunDirectory(tmp_path / "run", {"a": 1}, run.identity).open()
    run.close()
    with pytest.raises(ConfigError, match=r"model.width: 3 -> 4"):
        RunDirectory(tmp_path / "run", {"a": 1}, {"seed": 0, "model": {"width": 4}}).open()
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == ["b.c: 2 -> 3", "d: None -> 4"]


def test_log_forgets_what_comes_again(tmp_path):
    logger = RunLogger(tmp_path, images_per_step=8)
    for step in range(1, 6):
        logger.log_metrics({"loss": 1.0 / step}, step)
        logger.log_picture("samples", Image.new("RGB", (4, 4)), step, "a caption\u2028with a line end")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    logger.forget_after(3)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["images"] == 24


def test_a_failing_wandb_does_not_stop_the_run(caplog):
    mirror = WandbMirror.__new__(WandbMirror)

    def fail(*args, **kwargs):
        raise ConnectionResetError("the service is gone")

    mirror.failed, mirror.images_per_step = False, 1
    mirror.inner = SimpleNamespace(log_metrics=fail, log_image=fail)
    mirror.log_metrics({"loss": 1.0}, 1)
    mirror.log_picture("samples", Image.new("RGB", (4, 4)), 1)
    assert mirror.failed and len(caplog.records) == 1 and "metrics.jsonl" in caplog.text


@pytest.mark.slow
def test_wandb_has_the_same_pictures_offline(tiny_run):
    offline, scores = sorted((tiny_run / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime_ns)
    assert not list(scores.rglob("*.png"))  # what evaluate added afterwards, to the run of the same id
    ours = list((tiny_run / "images").glob("*.png"))
    copies = list((offline / "files/media/images").rglob("*.png"))
    assert len(copies) == len(ours) and any("jump_to_x0" in p.name for p in copies)
    sizes = sorted(Image.open(p).size for p in ours)
    assert sizes == sorted(Image.open(p).size for p in copies)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_pictures_are_dealt_in_equal_shares(monkeypatch, world, count):
    shares = []
    for rank in range(world):
        monkeypatch.setattr(pictures.collectives, "size", lambda: world)
        monkeypatch.setattr(pictures.collectives, "rank", lambda rank=rank: rank)
        shares.append(pictures._share(count))
    assert len({len(share) for share in shares}) == 1, "all walk together, and as many collectives"
    assert [i for share in shares for i in share][:count] == list(range(count))
    assert len(shares[0]) == -(-count // world)
