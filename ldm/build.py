"""Objects from configuration nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config.check import check_node, locate
from ldm.config.root import allowed_by_user, within
from ldm.errors import ConfigError

# What the command line and one's own YAML build from; a file of somebody else names less: ldm/allowed.py.
PACKAGES = ("ldm", "torch.optim", "torch.nn", "lightning", "torchmetrics")
MARKS = ("_target_", "_partial_", "_convert_")


def check_targets(node: Any, path: str = "config") -> None:
    """Raises ConfigError for a `_target_` outside the packages that may be built from, before it is imported."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            target, packages = str(node["_target_"]), (*PACKAGES, *allowed_by_user())
            homes = tuple(p.split(".")[0] for p in allowed_by_user())  # mine.Net may be written in mine.networks
            if not (within(target, packages) and within(_home(locate(target, path)), (*PACKAGES, *homes))):
                raise ConfigError(
                    f"{path}._target_={target} is outside the packages that configurations may build from "
                    f"({', '.join(packages)}): for code of your own set LDM_ALLOW=yourpackage."
                )
        for key, value in node.items():
            check_targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_targets(value, f"{path}[{i}]")


def _home(found: Any) -> str:
    """Where it was written, whatever name it is found under."""
    return f"{getattr(found, '__module__', None) or ''}.{getattr(found, '__qualname__', '')}"


def read_node(path: Path) -> Any:
    """A YAML file of one's own as plain data, its interpolations resolved."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def as_literal(value: Any) -> Any:
    """Plain data written so that an OmegaConf container gives it back as it was: `${` is text, no interpolation."""
    if isinstance(value, Mapping):
        return {k: as_literal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [as_literal(v) for v in value]
    # Backslashes mean something right before ${ only, where an odd number of them takes its meaning away.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def build(node: Any, path: str = "config", **kwargs: Any) -> Any:
    """The object that a node describes, None for an empty node; `kwargs` are objects made elsewhere,
    with which a `_partial_` node is called.

    A node that is plain data is taken as it is: `${` in it is text. Raises ConfigError for targets outside the packages
    that may be built from, for arguments that do not fit the signature, and for what the constructor refuses.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not plain:
        return None
    check_targets(plain, path)
    problems = check_node(path, {**plain, "_partial_": True} if kwargs else plain)
    if problems:
        raise ConfigError(" ".join(problems))
    return _made(plain, path, kwargs)


def _made(value: Any, path: str, more: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_made(v, f"{path}[{i}]", {}) for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    arguments = {k: _made(v, f"{path}.{k}", {}) for k, v in value.items() if k not in MARKS}
    if "_target_" not in value:
        return arguments
    target = locate(value["_target_"], path)
    try:
        return partial(target, **arguments) if value.get("_partial_") and not more else target(**arguments, **more)
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: {value['_target_']} cannot be made ({' '.join(reason.split())[:300]}).") from error
