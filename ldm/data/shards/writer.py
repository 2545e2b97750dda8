"""Writes data sets: the same samples make the same bytes, and nothing half-written ever looks complete."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ldm.atomic import sync
from ldm.data.captions import CAPTIONS_WANTED
from ldm.data.shards import tar
from ldm.data.shards.manifest import FORMAT, MANIFEST, content_fingerprint, read_manifest
from ldm.data.shards.splits import INDEX, scan_all
from ldm.data.sources.item import Item, Reject
from ldm.errors import ConfigError

Facts = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_FIELD = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
REJECTS, IDENTITY = "rejects.jsonl", "identity.json"


@dataclass(frozen=True)
class ShardEntry:
    """A shard's line in the manifest."""

    file: str
    bytes: int
    samples: int
    sha256: str
    fields: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"fields": list(self.fields)}


@dataclass
class Written:
    """What `write_dataset` did: where, how many a split, and what was turned away."""

    output: Path
    samples: dict[str, int]
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> the first name
    facts: dict[str, Any] = field(default_factory=dict)
    existed: bool = False

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {split}" for split, n in self.samples.items())
        lines = [f"{self.output}: {counts}{' (already there)' if self.existed else ''}"]
        lines += [f"  rejected {n}: {why} (first: {self.first[why]})" for why, n in self.rejected.most_common()]
        return "\n".join(lines)


def write_dataset(
    items: Iterable[Item | Reject],
    output: str | os.PathLike[str],
    samples_per_shard: int = 1000,
    facts: Facts = None,
    identity: Mapping[str, Any] | None = None,
) -> Written:
    """Items -> a folder of tars with manifest and index, renamed from `<output>.part` when all of it is on the disk.

    `facts` may be a function, called after the last item. `identity` is what determines the content: an output that has
    the same is left as it is, and an interrupted one goes on after its last finished shard.
    """
    final, part = Path(output), Path(f"{output}.part")
    name = json.dumps(identity, sort_keys=True, default=str) if identity is not None else ""
    if (there := _existing(final, name)) is not None:
        return there
    plan = f"{samples_per_shard} a shard {name}" if name else ""
    if part.exists() and (not plan or _read(part / IDENTITY) != plan):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    _write_text(part / IDENTITY, plan)
    writers, result, number = dict[str, SplitWriter](), Written(final, {}), 0
    with open(part / REJECTS, "w", encoding="utf-8") as rejects:
        for item in items:
            if isinstance(item, Reject):
                _note(item, result, rejects)
                continue
            if item.split not in writers:
                writers[item.split] = SplitWriter(part / _checked(item.split, _KEY, "split"), samples_per_shard)
            writers[item.split].add(item.key if item.key is not None else f"{number:09d}", item.fields)
            number += 1
        if not writers:
            shutil.rmtree(part)
            advice = f" {CAPTIONS_WANTED}" if {"no caption", "empty caption"} & result.rejected.keys() else ""
            rejected = f"{result.rejected.total()} rejected.{_reasons(result)}{advice}"
            raise ConfigError(f"nothing to write to {final}: {rejected}")
        result.facts = dict(facts() if callable(facts) else facts or {})
        for split, writer in writers.items():
            result.samples[split] = writer.finish(result.facts, identity)
    if len(writers) == 1 and (only := next(iter(writers))) == "train":
        for path in (part / only).iterdir():
            path.rename(part / path.name)
        (part / only).rmdir()
    (part / IDENTITY).unlink(missing_ok=True)
    if final.is_dir():  # empty, says _existing
        final.rmdir()
    part.rename(final)
    sync(final.parent)
    return result


class SplitWriter:
    """The shards of one split, filled one after another; finished ones of an interrupted run are kept."""

    def __init__(self, folder: Path, samples_per_shard: int = 1000) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard={samples_per_shard}: at least 1.")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.samples_per_shard = folder, samples_per_shard
        self.entries: list[ShardEntry] = []
        self._waiting: list[tuple[str, dict[str, bytes]]] = []
        self._keys = set[str]()

    def add(self, key: str, fields: Mapping[str, bytes]) -> None:
        if key in self._keys:
            raise ConfigError(f"key {key!r} comes twice. Leave Item.key empty to have the samples numbered.")
        if not fields:
            raise ConfigError(f"sample {key!r} has no fields.")
        self._keys.add(key)
        self._waiting.append((key, dict(fields)))
        if len(self._waiting) == self.samples_per_shard:
            self._flush()

    def _flush(self) -> None:
        path = self.folder / f"{len(self.entries):05d}.tar"
        entry = read_sidecar(path)
        if entry is None or entry.samples != len(self._waiting):
            entry = write_shard(path, self._waiting)
        self.entries.append(entry)
        self._waiting = []

    def finish(self, facts: Mapping[str, Any] | None = None, identity: Mapping[str, Any] | None = None) -> int:
        """Write the last shard, the manifest and the index; the number of samples."""
        if self._waiting:
            self._flush()
        write_manifest(self.folder, self.entries, facts, identity)
        return sum(entry.samples for entry in self.entries)


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardEntry:
    """One tar of (key, {field: bytes}), fields sorted, times 0: written beside, synced, renamed; with its sidecar.

    Workers may write different shards at the same time: nothing is shared. A shard whose sidecar exists is finished.
    """
    part, digest, count, names = path.with_name(path.name + ".part"), hashlib.sha256(), 0, set[str]()
    with open(part, "wb", buffering=1 << 20) as file:

        def put(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        for key, fields in samples:
            _checked(key, _KEY, "key")
            for name in sorted(fields):
                data = fields[name]
                put(tar.header(f"{key}.{_checked(name, _FIELD, 'field')}", len(data)) + data + tar.padding(len(data)))
                names.add(name)
            count += 1
        put(bytes(2 * tar.BLOCK))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if not count:
        part.unlink()
        raise ConfigError(f"{path}: a shard of no samples.")
    part.replace(path)
    entry = ShardEntry(path.name, size, count, digest.hexdigest(), tuple(sorted(names)))
    _write_text(_sidecar(path), json.dumps(entry.as_dict()))
    return entry


def read_sidecar(path: Path) -> ShardEntry | None:
    """The entry of a finished shard; None if it is not there, or not what its sidecar says."""
    try:
        record = json.loads(_sidecar(path).read_text("utf-8"))
        entry = ShardEntry(**record | {"fields": tuple(record["fields"])})
        with open(path, "rb") as file:
            whole = os.fstat(file.fileno()).st_size == entry.bytes and _digest(file) == entry.sha256
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entry if whole else None


def write_manifest(
    folder: Path,
    entries: Sequence[ShardEntry],
    facts: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> str:
    """manifest.json and index.npz for the shards of a folder, sidecars removed; the fingerprint."""
    shards = [entry.as_dict() for entry in entries]
    fingerprint = content_fingerprint(shards)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "samples": sum(entry.samples for entry in entries),
        "facts": dict(facts or {}),
        "identity": dict(identity or {}),
        "shards": shards,
    }
    index, _ = scan_all([folder / entry.file for entry in entries])  # reads back what was written, strictly
    index.save(folder / INDEX, source=fingerprint)
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, default=str))
    for entry in entries:
        _sidecar(folder / entry.file).unlink(missing_ok=True)
    return fingerprint


def _existing(final: Path, name: str) -> Written | None:
    """What is there already, if it is the same; ConfigError if it is something else."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    found = sorted(path.parent for path in [*final.glob(MANIFEST), *final.glob(f"*/{MANIFEST}")])
    folders = [folder for folder in found if any(folder.glob("*.tar"))]  # beside latents lies their autoencoder
    manifests = {folder: read_manifest(folder) for folder in folders}
    same = [json.dumps(m.get("identity"), sort_keys=True) == name for m in manifests.values()]
    if not name or not same or not all(same):
        raise ConfigError(f"{final} exists and holds something else. Choose another output=, or delete it.")
    samples = {"train" if folder == final else folder.name: m["samples"] for folder, m in manifests.items()}
    result = Written(final, samples, facts=next(iter(manifests.values())).get("facts", {}), existed=True)
    for line in filter(None, _read(final / REJECTS).split("\n")):  # captions may hold other line ends
        _count(Reject(**json.loads(line)), result)
    return result


def _note(reject: Reject, result: Written, file: IO[str]) -> None:
    file.write(json.dumps(vars(reject), ensure_ascii=False) + "\n")
    _count(reject, result)


def _count(reject: Reject, result: Written) -> None:
    result.rejected[reject.reason] += 1
    result.first.setdefault(reject.reason, reject.name)


def _reasons(result: Written) -> str:
    return "".join(f" {n} x {why} (first: {result.first[why]})." for why, n in result.rejected.most_common(3))


def _checked(name: str, pattern: re.Pattern[str], what: str) -> str:
    if not pattern.fullmatch(name):
        raise ConfigError(f"{what} {name!r} cannot stand in a shard: it must match {pattern.pattern}.")
    return name


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _write_text(path: Path, text: str) -> None:
    """Synced and renamed: the file is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
