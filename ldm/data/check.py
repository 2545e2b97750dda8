"""Looks through a whole data set before a run does: structure, digests, every sample decoded."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.fields import Fields
from ldm.data.samples import sequential
from ldm.data.shards.manifest import MANIFEST, read_manifest
from ldm.data.shards.splits import Shards, open_shards, scan_all, splits
from ldm.errors import ConfigError


@dataclass
class Report:
    """What is wrong with a data set; `ok` if nothing is."""

    samples: dict[str, int] = field(default_factory=dict)  # by split, "" for a folder without
    damaged: list[str] = field(default_factory=list)  # shards
    reasons: Counter[str] = field(default_factory=Counter)
    bad: list[dict[str, str]] = field(default_factory=list)  # samples: shard, key, reason, detail
    without_caption: int = 0  # samples: an autoencoder can be trained on them

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.bad

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "reasons": dict(self.reasons), "ok": self.ok}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} samples{f' in {split}' if split else ''}" for split, n in self.samples.items())
        lines = [f"{'sound' if self.ok else 'NOT sound'}: {counts or 'no samples'}", *self.damaged]
        lines += [f"{count} x {reason}" for reason, count in self.reasons.most_common()]
        if self.without_caption:
            lines.append(f"{self.without_caption} samples without a caption, which text wants: data.fields.caption=")
        return "\n".join(lines)


def check_dataset(
    path: str, decode: bool = True, digests: bool = True, threads: int = 2, fields: Fields | None = None
) -> Report:
    """Scan every header anew, compare the digests of the manifest, decode every sample; never raises for bad data."""
    report = Report()
    folders = {name: str(Path(path) / name) for name in splits(Path(path))} or {"": path}
    for name, folder in folders.items():
        try:
            shards = open_shards(folder, fields)
            scan_all(shards.files)
        except ConfigError as error:
            report.damaged.append(str(error))
            continue
        report.samples[name] = len(shards)
        if digests and (Path(folder) / MANIFEST).is_file():
            report.damaged += _changed(Path(folder))
        if decode:
            _decode(shards, report, threads)
    return report


def _changed(folder: Path) -> list[str]:
    changed = []
    for shard in read_manifest(folder)["shards"]:
        with open(folder / shard["file"], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:  # type: ignore[arg-type]
                changed.append(f"{folder / shard['file']}: the content is not what was written (sha256 differs)")
    return changed


def _decode(shards: Shards, report: Report, threads: int) -> None:
    reading = shards.reading.optional()
    for batch, found in sequential(shards, image_size=64, batch_size=64, threads=threads, fields=reading):
        report.without_caption += sum(caption is None for caption in batch.get("caption", ()))
        for bad in found:
            report.reasons[bad.error.reason] += 1
            report.bad.append({"shard": bad.url, "key": bad.key, "reason": bad.error.reason, "detail": str(bad.error)})
