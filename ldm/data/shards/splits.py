"""Data sets as folders of tars: found, checked strictly, indexed, and split into training and validation."""

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from ldm.data import order
from ldm.data.fields import IMAGE_FIELDS, Fields
from ldm.data.shards import index as indexing
from ldm.data.shards import tar
from ldm.data.shards.index import Index
from ldm.data.shards.manifest import MANIFEST, content_fingerprint, read_manifest
from ldm.errors import ConfigError

INDEX = "index.npz"
LATENT_FIELD = "latent.npy"
MIRRORED_FIELD = "latent_flip.npy"  # the latent of the mirrored picture
MOST_HELD_OUT = 1024
MAX_MEMBER = 1 << 30  # a member above 1 GiB is no picture, and reading it would fill the memory
_KEY_AND_FIELD = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's base_plus_ext
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips


@dataclass(frozen=True)
class Shards:
    """Some samples in some tars: what a loader needs to know of a data set."""

    path: Path
    files: tuple[Path, ...]
    index: Index
    fingerprint: str  # of the content, not of the place
    facts: dict[str, Any] = field(default_factory=dict)  # what prepare or encode found out
    reading: Fields = field(default_factory=Fields)  # which members are picture and caption
    descriptors: "Descriptors" = field(default_factory=lambda: Descriptors(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fields(self) -> tuple[str, ...]:
        return self.index.fields

    @property
    def kind(self) -> str:
        """ "latent" where the samples carry encoded latents, else "image"."""
        return "latent" if LATENT_FIELD in self.fields else "image"

    def take(self, positions: np.ndarray, name: str) -> "Shards":
        """Some of the samples; `name` says which, for the fingerprint."""
        mark = hashlib.sha256(f"{self.fingerprint} {name}".encode()).hexdigest()
        return replace(self, index=self.index.take(positions), fingerprint=mark)


class Descriptors:
    """Open files, at most `most` of them, shared by threads (pread keeps no position)."""

    def __init__(self, most: int = 128) -> None:
        self.most, self._lock, self._open = most, threading.Lock(), OrderedDict[Path, _Descriptor]()

    def get(self, path: Path) -> "_Descriptor":
        with self._lock:
            found = self._open.pop(path, None) or _Descriptor(path)
            self._open[path] = found
            if len(self._open) > self.most:
                self._open.popitem(last=False)  # closes when the last reader has let go of it
            return found


class _Descriptor:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def open_split(
    path: str | os.PathLike[str],
    split: str = "train",
    validation_fraction: float = 0.02,
    fields: Fields | None = None,
) -> Shards:
    """The samples of one split: the folder of that name, or the deterministic share of a folder that has none.

    Without a val/ folder the samples whose keys hash lowest are held out, at most 1024: training and validation never
    share a sample. Where that share is none (few samples, or a fraction of 0) validation looks at the first of the
    training samples: see `split_names`.
    """
    root = Path(path)
    own = (root / split).is_dir() and (split == "val" or (root / "val").is_dir())
    if own or split not in ("train", "val"):
        if not (root / split).is_dir():
            raise ConfigError(f"{root} has no {split}/ folder: splits there: {', '.join(splits(root)) or 'none'}.")
        return open_shards(root / split, fields)
    whole = open_shards(root / "train" if (root / "train").is_dir() else path, fields)
    held_out = _held_out(whole, validation_fraction)
    wanted = held_out if split == "val" and held_out.any() else ~held_out
    positions = np.flatnonzero(wanted)[: MOST_HELD_OUT if split == "val" else None]
    return whole.take(positions, f"{split} {validation_fraction}")


def split_names(
    path: str | os.PathLike[str], validation_fraction: float = 0.02, fields: Fields | None = None
) -> list[str]:
    """The splits that a data set's samples lie in: its folders, and "val" where `open_split` would hold a share out."""
    root = Path(path)
    names = splits(root)
    if "val" in names:
        return names
    whole = open_shards(root / "train" if "train" in names else path, fields)
    return sorted({*names, "train", *(["val"] if _held_out(whole, validation_fraction).any() else [])})


def _held_out(whole: Shards, fraction: float) -> np.ndarray:
    return order.validation_share([bytes(key) for key in whole.index.keys], fraction, MOST_HELD_OUT)


def splits(path: Path) -> list[str]:
    """The sub-folders of a data set that hold tars."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and any(p.glob("*.tar"))) if path.is_dir() else []


def open_shards(path: str | os.PathLike[str], fields: Fields | None = None) -> Shards:
    """A folder of tars, a pattern such as data/{00000..00009}.tar or data/*.tar, or one tar, checked and indexed.

    What `task=prepare` wrote has a manifest and opens at once; the tars of others (img2dataset, webdataset's writer)
    are scanned header by header the first time, and the index is kept beside them where that folder can be written.
    Another choice of `fields` is another data set: it has another fingerprint. Latents are ours, and read as they were
    written: what they were made of was chosen then.
    """
    files = find_tars(path)
    folder = Path(path)
    ours = folder.is_dir() and (folder / MANIFEST).is_file()
    found = _open_ours(folder, files) if ours else _open_foreign(folder, files)
    if found.kind == "latent":
        return found
    reading = fields or Fields()
    _refuse_dotted(found, reading)
    mark = reading.mark()
    fingerprint = hashlib.sha256(f"{found.fingerprint} {mark}".encode()).hexdigest() if mark else found.fingerprint
    return replace(found, reading=reading, fingerprint=fingerprint)


def _refuse_dotted(shards: Shards, reading: Fields) -> None:
    """Refuse what a dot in a name did: img.v1.jpg and img.v2.jpg are one sample "img" without a picture."""
    names, there = shards.fields, shards.index.offset >= 0
    if any("." in name for name in reading.image):
        return  # named on purpose
    dotted = [i for i, name in enumerate(names) if "." in name and name.rpartition(".")[2] in IMAGE_FIELDS]
    pictures = [i for i, name in enumerate(names) if name in reading.image]
    lost = np.flatnonzero(there[:, dotted].any(axis=1) & ~there[:, pictures].any(axis=1))
    if len(lost):
        key, row = shards.index.key(lost[0]), there[lost[0]]
        member = next(names[i] for i in dotted if row[i])
        raise tar.damaged(
            shards.files[shards.index.shard[lost[0]]],
            f"member {f'{key}.{member}'!r} has a dot in its name, so webdataset reads it as field {member!r} of"
            f" sample {key!r}, which has no other picture",
            f"If that is the picture, say data.fields.image=[{member}]; else rename the pictures without dots and pack"
            " them again.",
        )


def find_tars(path: str | os.PathLike[str]) -> list[Path]:
    """The tars that a path or pattern means, sorted; an error that says what to type where there are none."""
    text = os.fspath(path)
    if text.startswith("pipe:") or "://" in text:
        raise ConfigError(
            f"shards={text}: only files are read here; pipe: would run a command. Download the shards first"
            " (for https addresses: data.mode=stream)."
        )
    if os.path.isdir(text):
        files = sorted(Path(text).glob("*.tar"))
        if not files:
            raise ConfigError(f"{text} holds no .tar files{_near(Path(text))}. {_HOW_TO_MAKE}")
        return files
    files = []
    for pattern in braceexpand(text):
        found = sorted(glob(pattern)) if any(c in pattern for c in "*?[") else [pattern]
        missing = [p for p in found if not os.path.isfile(p)] or ([] if found else [pattern])
        if missing:
            raise ConfigError(f"no shards at {missing[0]}{_near(Path(missing[0]))}. {_HOW_TO_MAKE}")
        files += [Path(p) for p in found]
    return list(dict.fromkeys(files))


_HOW_TO_MAKE = "Make them with `task=prepare source=folder images=DIR output=DIR`, or give `shards=` another path."


def _near(path: Path) -> str:
    """What lies there instead."""
    if splits(path):
        return f", only the splits {', '.join(splits(path))}: name one of them, {path / splits(path)[0]}"
    if path.is_dir() and any(path.glob("*.tar.*")):
        return ", only compressed ones (gunzip them: random access needs plain tars)"
    if Path(f"{path}.part").exists():
        return f" (an unfinished {path}.part is there: run the same prepare again)"
    return ""


def _open_ours(folder: Path, files: list[Path]) -> Shards:
    manifest = read_manifest(folder)
    named = [folder / shard["file"] for shard in manifest["shards"]]
    if extra := sorted(set(files) - set(named)):
        raise ConfigError(
            f"{extra[0]} is not in {folder / MANIFEST}. Move it away, or delete {MANIFEST} to have"
            " the folder scanned anew."
        )
    for file, shard in zip(named, manifest["shards"], strict=True):
        actual = file.stat().st_size if file.is_file() else -1
        if actual != shard["bytes"]:
            state = f"has {actual} bytes, the manifest says {shard['bytes']}" if actual >= 0 else "is missing"
            raise tar.damaged(file, state, "Copy it again, or run prepare again.")
    fingerprint = content_fingerprint(manifest["shards"])
    index = _cached(folder / INDEX, fingerprint, named)
    if index is None:
        index, _ = scan_all(named)
        _try_save(index, folder / INDEX, fingerprint)
    if len(index) != sum(shard["samples"] for shard in manifest["shards"]):
        raise ConfigError(f"{folder}: {len(index)} samples, but the manifest counts others. Run prepare again.")
    return Shards(folder, tuple(named), index, fingerprint, manifest.get("facts") or {})


def _open_foreign(path: Path, files: list[Path]) -> Shards:
    """The cached index holds for these files, sizes and times; the fingerprint is of the headers, not of all bytes."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    seen = "scan " + hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    whole_folder = path.is_dir()
    index = _cached(path / INDEX, seen, files) if whole_folder else None
    headers = indexing.load(path / INDEX)[1].get("headers") if index is not None else None
    if index is None or headers is None:
        index, headers = scan_all(files)
        if whole_folder:
            _try_save(index, path / INDEX, seen, headers=headers)
    return Shards(path, tuple(files), index, f"scan-{headers}")


def _cached(path: Path, source: str, files: Sequence[Path]) -> Index | None:
    """The saved index if it was made from this very content; anything else is as good as absent, a scan rebuilds it."""
    try:
        index, notes = indexing.load(path)
        return index if notes.get("source") == source and len(index) and _lies_in(index, files) else None
    except Exception:  # a damaged or hostile file has too many ways to fail, and all mean the same
        return None


def _lies_in(index: Index, files: Sequence[Path]) -> bool:
    """Whether the samples' keys are texts without "..", and every member lies within its file."""
    if not (0 <= index.shard.min() <= index.shard.max() < len(files)) or (np.char.find(index.keys, b"..") >= 0).any():
        return False
    if not index.keys.tobytes().isascii():
        np.char.decode(index.keys, "utf-8")  # raises
    end = np.array([file.stat().st_size for file in files], np.int64)[index.shard][:, None]
    there = (index.offset >= 0) & (index.size >= 0) & (index.size <= end) & (index.offset <= end - index.size)
    return bool((there | ((index.offset == -1) & (index.size == -1))).all())


def _try_save(index: Index, path: Path, source: str, **notes: str) -> None:
    part = path.with_name(f"{path.name}.part.{os.getpid()}")
    try:
        index.save(part, source=source, **notes)
        os.replace(part, path)
    except OSError:  # a read-only data set: the scan is repeated next time
        part.unlink(missing_ok=True)


def scan_all(files: Sequence[Path]) -> tuple[Index, str]:
    """Index of all samples of all tars, and a digest of their headers; raises ConfigError at the first damage."""
    digest, shards = hashlib.sha256(), []
    for file in files:
        members, headers = tar.scan(file)
        digest.update(headers.encode())
        shards.append(list(group(members, file)))
        if not shards[-1]:
            raise tar.damaged(file, "holds no sample (no member named key.extension)", "Remove it from the folder.")
    index = indexing.build(shards)
    order = np.argsort(index.keys, kind="stable")
    twice = np.flatnonzero(index.keys[order][1:] == index.keys[order][:-1])
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        raise tar.damaged(
            files[index.shard[second]],
            f"key {index.key(second)!r} is also in {files[index.shard[first]].name}",
            "One of the two would be lost or read twice: rename keys, or remove one of the shards.",
        )
    return index, digest.hexdigest()


def group(members: Sequence[tar.Member], file: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Members -> samples by webdataset's rule: the key is the name up to the first dot after the last slash."""
    seen, key, found = set[str](), "", dict[str, tuple[int, int]]()
    for member in members:
        match = _KEY_AND_FIELD.match(member.name)
        if _METADATA.match(member.name) or match is None:
            continue  # README, .hidden: no samples in webdataset's eyes either
        name, ext = match[1], match[2].lower()
        if name != key:
            if key:
                yield key, found
            if name in seen:
                raise tar.damaged(
                    file,
                    f"key {name!r} comes again at member {member.name!r}, apart from its first members",
                    "Readers of tars would see two half samples: pack the members of a sample side by side.",
                )
            _check_key(name, file)
            seen.add(name)
            key, found = name, {}
        if ext in found:
            raise tar.damaged(file, f"member {member.name!r} is there twice", "Keep one of them.")
        if member.size > MAX_MEMBER:
            raise tar.damaged(file, f"member {member.name!r} has {member.size} bytes, more than 1 GiB", "Remove it.")
        found[ext] = (member.offset, member.size)
    if key:
        yield key, found


def _check_key(key: str, file: Path) -> None:
    if key.startswith("/") or ".." in key.split("/") or "\\" in key or not key.isprintable():
        raise tar.damaged(file, f"key {key!r} points outside of its folder or holds control characters", "Rename it.")


def file_name(key: str) -> str:
    """A key as the name of a file: no slashes, no leading dots, nothing that a shell or another system trips over."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_")[:100] or "sample"
