"""The folder of configurations, and configurations as plain data."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.errors import ConfigError


def conf_dir() -> Path:
    """The one folder of configurations: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parents[1]  # the package
    for folder in (here.parent / "conf", here / "conf"):
        if (folder / "config.yaml").is_file() and "ldm.root" in (folder / "config.yaml").read_text().split("\n", 1)[0]:
            return folder
    raise ConfigError(f"the configuration folder conf/ is neither beside nor inside {here}: install ldm again.")


def option(group: str, name: str) -> DictConfig:
    """What stands in conf/GROUP/NAME.yaml."""
    found = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    assert isinstance(found, DictConfig)
    return found


def allowed_by_user() -> tuple[str, ...]:
    """Packages and names of your own, as LDM_ALLOW lists them ("mypackage,other.module.Class")."""
    return tuple(p.strip(" .") for p in os.environ.get("LDM_ALLOW", "").split(",") if p.strip(" ."))


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `packages`, or in one."""
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def digest(value: Any, length: int = 8) -> str:
    """A short fingerprint of plain data, the same in every process."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def plain(config: DictConfig | ListConfig) -> Any:
    """Plain containers, resolved: what is written to disk and into checkpoints.

    But for the root's `module`, which says by reference (`${optimizer}`) what stands beside it in the same file.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    if isinstance(config, DictConfig) and "module" in config and OmegaConf.is_dict(config.module):
        values["module"] = OmegaConf.to_container(config.module, resolve=False)
    return values


def reference(value: Any) -> str | None:
    """The key that a value such as `${optimizer}` stands for; None for other values."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return found[1] if found else None


def without_references(node: Any) -> Any:
    """What a node says itself: without the values that it takes from elsewhere in its configuration."""
    if isinstance(node, dict):
        return {k: without_references(v) for k, v in node.items() if reference(v) is None}
    return [without_references(v) for v in node if reference(v) is None] if isinstance(node, list) else node
