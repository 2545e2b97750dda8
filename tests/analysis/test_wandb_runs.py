"""Runs out of W&B's files and from its server: the frames are those of the run directory."""

import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from written_runs import MakeRun

from ldm.analysis import Run, WandbRun, compare, diff, plot_loss, runs
from ldm.errors import ConfigError
from ldm.training.run.logging import RunLogger

HEADER = b":W&B\xe1\xbe\x00"


@pytest.mark.slow
def test_offline_files_say_what_the_run_directory_says(tiny_run: Path) -> None:
    ours, theirs = Run(tiny_run), WandbRun.offline(tiny_run / "wandb")
    assert theirs.metrics.drop(columns="time").equals(ours.metrics.drop(columns="time"))
    assert theirs.config == ours.config and theirs.scores.equals(ours.scores) and theirs.scalars() == ours.scalars()
    assert theirs.x0_error().equals(ours.x0_error()) and theirs.status["state"] == "finished"
    same = ["step", "key", "caption"]
    assert theirs.pictures()[same].equals(ours.pictures()[same])
    assert theirs.picture("samples").tobytes() == ours.picture("samples").tobytes()
    assert compare(ours, theirs).empty and diff(ours, theirs).empty
    (one,) = runs(tiny_run / "wandb")["val/loss"]
    assert one == ours.scalars()["val/loss"] and plot_loss(tiny_run / "wandb").axes


def log(path: Path, *records: Any) -> None:
    """Writes a .wandb file of W&B's own messages, cut into pieces at blocks of 32 KiB."""
    data = bytearray(HEADER)
    for record in records:
        message, kind = record.SerializeToString(), None
        while kind not in (1, 4):
            room = 2**15 - len(data) % 2**15
            if room < 7:
                data += bytes(room)
                continue
            piece, message = message[: room - 7], message[room - 7 :]
            kind = (1 if not message else 2) if kind is None else (4 if not message else 3)
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(data))


def history(step: int, **values: str) -> Any:
    from wandb.proto import wandb_internal_pb2 as messages

    record = messages.Record()
    for key, value in {"trainer/global_step": str(step), "images": str(2 * step), **values}.items():
        record.history.item.add(nested_key=[key], value_json=value)
    return record


def test_a_resumed_run_is_its_files_together_and_forgets_what_it_did_again(tmp_path: Path) -> None:
    log(tmp_path / "offline-run-1/a.wandb", *(history(s, loss=str(s)) for s in range(1, 6)))
    log(tmp_path / "offline-run-2/a.wandb", *(history(s, loss=str(10 * s), other='"text"') for s in range(3, 5)))
    frame = WandbRun.offline(tmp_path).metrics
    assert frame["step"].tolist() == [1, 2, 3, 4] and frame["loss"].tolist() == [1, 2, 30, 40]
    assert frame.columns.tolist() == ["step", "images", "time", "loss"]


def test_records_of_several_blocks_and_numbers_that_are_none(tmp_path: Path) -> None:
    long = {f"x/{i}": "0.5" for i in range(3000)}
    log(tmp_path / "offline-run-1/a.wandb", history(1, **long), history(2, loss="NaN"), history(3, loss="Infinity"))
    frame = WandbRun.offline(tmp_path).metrics
    assert len(frame.columns) == 3004 and (frame.filter(like="x/").iloc[0] == 0.5).all()
    assert frame["loss"].isna().all() and frame["step"].tolist() == [1, 2, 3]


def test_a_file_that_is_cut_or_damaged_is_read_up_to_there(tmp_path: Path) -> None:
    file = tmp_path / "offline-run-1/a.wandb"
    log(file, *(history(s, loss=str(s)) for s in range(1, 20)))
    data = file.read_bytes()
    read = []
    for end in range(0, len(data), 29):
        for text in (data[:end], data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]):
            file.write_bytes(text)
            run = WandbRun.offline(tmp_path)
            steps = run.metrics["step"].tolist()
            assert steps == list(range(1, len(steps) + 1)) and run.status["state"] == "running"
            read.append(len(steps))
    cut, damaged = read[::2], read[1::2]
    assert cut == sorted(cut) and cut[0] == 0 and cut[-1] == 18
    assert damaged[1:] == cut[1:]  # the first bytes, which name the format, are not asked


def test_a_picture_outside_its_folder_is_none(tmp_path: Path) -> None:
    record = history(1)
    record.history.item.add(nested_key=["p", "filenames"], value_json='["../../secret.png"]')
    log(tmp_path / "offline-run-1/a.wandb", record)
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    assert WandbRun.offline(tmp_path).pictures().empty


class Server:
    """wandb.Api as far as it is asked: one project with the runs that were given."""

    def __init__(self, *given: Run):
        self.known = {f"e/p/{run.name}": self.made(run) for run in given}

    def made(self, run: Run) -> SimpleNamespace:
        rows = [{"trainer/global_step": r.pop("step"), "_timestamp": r.pop("time"), **r} for r in run._records()]
        rows += [
            {"trainer/global_step": p.step, p.key: {"filenames": [f"images/{p.path.name}"], "captions": [p.caption]}}
            for p in run.pictures().itertuples()
        ]
        rows = [{**r, "epoch": 0, "_step": i, "system": "text"} for i, r in enumerate(rows)]
        summary = {k: v for row in rows for k, v in row.items()} | {
            "evaluation/seen/all": 0.5,
            "_wandb": {"runtime": 3},
        }
        about = {"digest": run.about["digest"]}
        return SimpleNamespace(
            path=["e", "p", run.name],
            name=run.name,
            state="crashed",
            config={**run.config, "run": about},
            summary=summary,
            scan_history=lambda: iter(rows),
            file=lambda name: SimpleNamespace(download=lambda root, replace: self.sent(run.path / name, Path(root))),
        )

    @staticmethod
    def sent(file: Path, root: Path) -> Any:
        return Path(shutil.copy(file, root)).open()

    def run(self, path: str) -> Any:
        return self.known[path]

    def runs(self, path: str) -> list[Any]:
        if path != "e/p":
            raise ValueError(f"Could not find project {path}")
        return list(self.known.values())


def test_the_server_gives_what_the_directories_give(make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [make("a"), make("b", {"seed": 1}, step=5)]
    RunLogger(both[1].path).log_picture("samples", Image.new("RGB", (3, 3), "red"), 5, "a red square")
    monkeypatch.setattr("wandb.Api", lambda: Server(*both))
    table = runs("wandb://e/p").set_index("name")
    local = runs(both[0].path.parent / "*").set_index("name")
    shared = [c for c in local if c not in ("path", "state")]
    assert table[shared].equals(local[shared]) and set(table["state"]) == {"stopped"}
    run = WandbRun.online("wandb://e/p/b")
    assert run.metrics.equals(both[1].metrics) and run.config == both[1].config and run.about == {"digest": "b"}
    assert run.scores["score"].tolist() == ["seen/all"] and compare("wandb://e/p/a", both[0]).empty
    assert len(runs("wandb://e/p/b")) == 1
    assert run.pictures()["caption"].tolist() == ["a red square"]
    assert run.picture("samples").getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("address", ["wandb://e", "wandb://e/", "wandb://e/p/x", "wandb://e/none", "wandb://"])
def test_what_the_server_has_not_is_one_line(address: str, make: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.Api", lambda: Server(make("a")))
    with pytest.raises(ConfigError, match="wandb") as error:
        runs(address)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="holds no offline run"):
        WandbRun.offline(make("b").path)
