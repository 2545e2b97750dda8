"""task=prepare: images and captions from a source into shards."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ldm.build import build
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.data.shards.writer import Written, write_dataset
from ldm.errors import ConfigError


def prepare(config: DictConfig) -> dict[str, float]:
    """Writes output=DIR (default: outputs/stages/shards-<digest of the source>); says what was left out."""
    check(config)
    written = prepare_shards(plain(config), Path(config.output) if config.output else None)
    print(written)
    print(f"shards: {written.output}")
    return {f"samples/{split}": float(n) for split, n in written.samples.items()}


def prepare_shards(config: dict, output: Path | None = None) -> Written:
    """The source's samples as shards; left as they are when they are there already."""
    if config.get("images") and "images" not in config["source"]:
        raise ConfigError(
            f"images={config['images']} is not read by {config['source']['_target_']}: add source=folder."
        )
    source = build(config["source"], "source")
    lacking = [name for name in ("__iter__", "identity", "facts") if not hasattr(source, name)]
    if lacking:
        raise ConfigError(
            f"source._target_={config['source']['_target_']} has no {', '.join(lacking)}: ldm.data.sources.item.Source "
            "says what a source needs."
        )
    identity = source.identity()
    output = output or Path(config["outputs"]) / "stages" / f"shards-{digest(identity)}"
    return write_dataset(source, output, facts=source.facts, identity=identity)
