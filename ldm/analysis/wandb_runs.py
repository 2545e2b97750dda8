"""Runs as W&B has them, from its server or from the files of offline runs: frames as from a run directory."""

from __future__ import annotations

import json
import math
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.analysis.logged import Logged, Scalars, is_number
from ldm.errors import ConfigError
from ldm.untrusted import readable

SCHEME = "wandb://"
SCORES = "evaluation/"  # names in W&B's summary that task=evaluate has written
BLOCK, HEAD, LARGEST = 2**15, 7, 2**26  # bytes: of a block of the log, before each piece, and of a record at most
WHOLE, FIRST, _, LAST = KINDS = (1, 2, 3, 4)  # kinds of pieces
UNSAID = ("epoch", "trainer/global_step")  # in W&B's rows, and no scalars of ours
STATES = {"failed": "stopped", "crashed": "stopped", "killed": "stopped"}  # W&B's names of what we name otherwise


class WandbRun(Logged):
    """One run of W&B's.

    >>> WandbRun.online("wandb://entity/project/run_id").metrics
    >>> WandbRun.offline("outputs/mine/wandb").picture("samples")
    """

    def __init__(self, path: str, name: str, config: Scalars, status: Scalars, summary: Scalars):
        self.path, self._name, self._status, self._summary = path, name, status, summary
        self._config = {k: v for k, v in config.items() if k not in ("run", "_wandb")}
        self._about = config.get("run") if isinstance(config.get("run"), dict) else {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @staticmethod
    def online(path: str) -> WandbRun:
        """The run at wandb://ENTITY/PROJECT/ID. ConfigError where there is none, or no W&B to ask."""
        return OnlineRun(_asked(path, lambda api: api.run(path.removeprefix(SCHEME))))

    @staticmethod
    def offline(folder: str | Path) -> WandbRun:
        """The run in an offline-run-* folder, or in a folder of several that are one run: it went on in each."""
        return OfflineRun(Path(folder))

    @property
    def name(self) -> str:
        return self._name

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def status(self) -> dict[str, Any]:
        return self._status

    @property
    def about(self) -> dict[str, Any]:
        return self._about or {}

    @property
    def evaluation(self) -> dict[str, Any]:
        metrics = {k.removeprefix(SCORES): v for k, v in self._summary.items() if k.startswith(SCORES)}
        return {"metrics": metrics} if metrics else {}

    def _history(self) -> Iterable[Scalars]:
        """Rows as W&B has them."""
        raise NotImplementedError(f"{type(self).__name__} must say where its history is.")

    def _records(self) -> Iterable[Scalars]:
        for row in self._history():
            record = _scalars(row)
            if record:
                yield {"step": _step(row), "time": row.get("_timestamp"), **record}


class OnlineRun(WandbRun):
    """A run on a W&B server: its history is fetched when it is asked for, its last values come with the run."""

    def __init__(self, run: Any):
        summary = dict(run.summary)
        state = STATES.get(run.state, run.state)
        status = {"state": state, "step": _step(summary) or 0, "time": summary.get("_timestamp", 0.0)}
        super().__init__(SCHEME + "/".join(run.path), run.name, dict(run.config), status, summary)
        self._run = run

    @cached_property
    def _fetched(self) -> list[Scalars]:
        return list(self._run.scan_history())

    def _history(self) -> list[Scalars]:
        return self._fetched

    def scalars(self) -> dict[str, float]:
        return self.last()[1]

    def last(self) -> tuple[int, dict[str, float]]:
        known = {k: v for k, v in _scalars(self._summary).items() if k != "images" and not k.startswith(SCORES)}
        return self.status["step"], {k: float(v) for k, v in sorted(known.items()) if v is not None}

    def _pictures(self) -> Iterable[tuple[int, str, Path | str, str]]:
        return [
            (step, key, f"{self.path}/{file}", text)
            for row in self._fetched
            for step, key, file, text in _pictures(row)
        ]

    def _local(self, path: Path | str) -> Path:
        folder = tempfile.mkdtemp(prefix="ldm-wandb-")
        file = str(path).removeprefix(f"{self.path}/")
        return Path(_asked(str(path), lambda api: self._run.file(file).download(root=folder, replace=True)).name)


class OfflineRun(WandbRun):
    """A run in W&B's own files, read in order of their names, which begin with the time."""

    def __init__(self, folder: Path):
        logs = sorted(folder.glob("*.wandb")) or sorted(folder.glob("offline-run-*/*.wandb"))
        if not logs:
            raise ConfigError(
                f"{folder} holds no offline run of W&B: give an offline-run-* folder, which has a .wandb."
            )
        self._lines: list[Scalars] = []
        known: Scalars = {"name": folder.name, "config": {}, "summary": {}, "state": "running"}
        for log in logs:
            self._add(log, known)
        step = max((_step(row) or 0 for row in self._lines), default=0)
        when = max((row["_timestamp"] for row in self._lines if is_number(row.get("_timestamp"))), default=0.0)
        status = {"state": known["state"], "step": step, "time": when}
        super().__init__(str(folder), known["name"], known["config"], status, known["summary"])

    def _add(self, log: Path, known: Scalars) -> None:
        """One file. A run that went on in it forgets what it had logged beyond the checkpoint that it came from."""
        lines: list[Scalars] = []
        for record in _wandb_records(log):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                known["name"] = record.run.display_name or known["name"]
                known["config"] = _items(record.run.config.update)
                known["state"] = "running"
            elif kind == "history":
                lines.append({**_items(record.history.item), "_folder": str(log.parent)})
            elif kind == "summary":
                known["summary"].update(_items(record.summary.update))
            elif kind == "exit":
                known["state"] = "stopped" if record.exit.exit_code else "finished"
        begun = next((step for row in lines if (step := _step(row)) is not None), math.inf)
        self._lines = [row for row in self._lines if (_step(row) or 0) < begun] + lines

    def _history(self) -> list[Scalars]:
        return self._lines

    def _pictures(self) -> Iterable[tuple[int, str, Path | str, str]]:
        for row in self._lines:
            files = (Path(row["_folder"]) / "files").resolve()
            for step, key, file, caption in _pictures(row):
                path = (files / file).resolve()
                if path.is_relative_to(files) and path.is_file():
                    yield step, key, path, caption


def online_runs(path: str) -> list[Logged]:
    """The runs at wandb://ENTITY/PROJECT, the newest first, or the one at wandb://ENTITY/PROJECT/ID."""
    if path.removeprefix(SCHEME).count("/") == 2:
        return [WandbRun.online(path)]
    return _asked(path, lambda api: [OnlineRun(run) for run in api.runs(path.removeprefix(SCHEME))])


def is_offline_run(path: Path) -> bool:
    """Whether W&B keeps a run in this folder, or several parts of one."""
    return path.is_dir() and any(any(path.glob(p)) for p in ("*.wandb", "offline-run-*/*.wandb"))


def _asked(path: str, ask: Any) -> Any:
    """What W&B's public API answers. ConfigError for whatever keeps it from answering."""
    parts = path.removeprefix(SCHEME).split("/")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{path} names no project of W&B: give wandb://ENTITY/PROJECT, or wandb://ENTITY/PROJECT/ID.")
    import wandb  # seconds

    try:
        return ask(wandb.Api())
    except Exception as error:  # of the network, of the key, of the server: each has a class of its own
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{path}: W&B does not answer ({said}). `wandb login` gives a key; runs on this disk need none: "
            "outputs/*/wandb."
        ) from error


def _scalars(row: Scalars) -> Scalars:
    """The scalars in a row of W&B's, and the images seen; null for what is no finite number, as in metrics.jsonl."""
    found: Scalars = {}
    for key, value in row.items():
        if key.startswith("_") or key in UNSAID or isinstance(value, bool):
            continue
        if is_number(value):
            found[key] = value
        elif isinstance(value, float) or value in ("NaN", "Infinity", "-Infinity"):  # as W&B's server spells them
            found[key] = None
    return found if set(found) - {"images"} else {}


def _step(row: Scalars) -> int | None:
    step = row.get("trainer/global_step")
    return step if type(step) is int else None


def _pictures(row: Scalars) -> Iterator[tuple[int, str, str, str]]:
    """(step, key, file, caption) of the pictures in a row: the first of each key, we log no other."""
    step = _step(row)
    for key, value in row.items():
        files, captions = (value.get(k) if isinstance(value, dict) else None for k in ("filenames", "captions"))
        if step is not None and isinstance(files, list) and files and isinstance(files[0], str):
            yield step, key, files[0], str(captions[0]) if isinstance(captions, list) and captions else ""


def _items(items: Iterable[Any]) -> Scalars:
    """Keys and values of a W&B record, nested keys as nested dictionaries."""
    found: Scalars = {}
    for item in items:
        keys = list(item.nested_key) or [item.key]
        node = found
        for key in keys[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if isinstance(node, dict):
            with suppress(ValueError, RecursionError):
                node[keys[-1]] = json.loads(item.value_json)
    return found


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, up to its end or to the first that is not whole, as a killed process leaves.

    LevelDB's log: blocks of 32 KiB of pieces, each with a CRC, a length and its kind; a record is one or several. W&B
    ships no reader for it in Python.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    record = b""
    for kind, piece in _pieces(path):
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if len(record) > LARGEST:
            return
        if kind in (WHOLE, LAST):
            message = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                message.ParseFromString(record)
            except DecodeError:
                return
            yield message


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    with readable(path), path.open("rb") as file:
        block = file.read(BLOCK)
        position = HEAD  # of the file: ":W&B", a magic number and a version
        while block:
            while position + HEAD <= len(block):
                crc, length, kind = struct.unpack_from("<IHB", block, position)
                piece = block[position + HEAD : position + HEAD + length]
                if kind == 0 and length == 0:  # the rest of the block is empty
                    break
                if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != crc or kind not in KINDS:
                    return
                yield kind, piece
                position += HEAD + length
            block, position = file.read(BLOCK), 0
