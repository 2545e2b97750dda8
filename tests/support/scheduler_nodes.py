"""Our sampler's node for a scheduler_config.json."""

from __future__ import annotations

import yaml

from ldm.config.root import conf_dir
from ldm.formats.schedulers import adjusted, own_sampler


def sampler_node(config: dict, name: str | None = None) -> dict:
    """The node of the config's own class, or of a named sampler on this checkpoint."""
    own, options = own_sampler(config) if name is None else (name, {})
    node = yaml.safe_load((conf_dir() / "sampler" / f"{own}.yaml").read_text())
    node["solve"] |= options
    return adjusted(node, config)
