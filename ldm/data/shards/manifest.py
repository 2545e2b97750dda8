"""What a folder of shards says of itself: its files with their digests, and facts about what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_PICTURE = 2**12  # pixels a side


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, checked: it may come from elsewhere."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        for shard in manifest["shards"]:
            if Path(shard["file"]).name != shard["file"] or not isinstance(shard["bytes"], int):
                raise ValueError(f"shard {shard['file']!r}")
            shard["sha256"].encode()
            _ = shard["samples"] + 0
        _check_facts(manifest.get("facts") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{folder / MANIFEST} is unreadable ({error!r}). Run prepare again, or delete it to have the tars scanned."
        ) from None
    if manifest.get("format") != FORMAT:
        raise ConfigError(f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}.")
    return manifest


def _check_facts(facts: dict[str, Any]) -> None:
    """ValueError for facts that sizes and places cannot be taken from; a source of one's own may add others."""
    size, fraction = facts.get("image_size"), facts.get("held_out_fraction", 0)
    if size is not None and (type(size) is not int or not 1 <= size <= LARGEST_PICTURE):
        raise ValueError(f"facts.image_size {size!r}")
    if not isinstance(facts.get("parent", ""), str):
        raise ValueError(f"facts.parent {facts['parent']!r}")
    if type(fraction) not in (int, float) or (facts.get("source") == "shapes" and "held_out_fraction" not in facts):
        raise ValueError(f"facts.held_out_fraction {fraction!r}")


def content_fingerprint(shards: Sequence[dict[str, Any]]) -> str:
    """The data set's identity: a digest of its shards' digests, in order; names and places do not matter."""
    return hashlib.sha256("\n".join(shard["sha256"] for shard in shards).encode()).hexdigest()
