"""Objects from configuration nodes, through an allow-list: a checkpoint's configuration cannot run other code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config import check_node, locate
from ldm.errors import ConfigError

ALLOWED = ("ldm.", "torch.optim.", "torch.nn.", "lightning.", "torchmetrics.")


def allowed_prefixes() -> tuple[str, ...]:
    """The allow-list, with the packages of your own that LDM_ALLOW names ("mypackage,other")."""
    extra = [p.strip() for p in os.environ.get("LDM_ALLOW", "").split(",") if p.strip()]
    return (*ALLOWED, *(p.rstrip(".") + "." for p in extra))


def check_targets(node: Any, path: str = "config") -> None:
    """Raises ConfigError for a `_target_` outside the allow-list, also under another name."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            target = str(node["_target_"])
            found = getattr(locate(target, path), "__module__", "") or ""
            for name in (target, f"{found}."):
                if not name.startswith(allowed_prefixes()):
                    raise ConfigError(
                        f"{path}._target_={target} is outside the packages that configurations may build from "
                        f"({', '.join(allowed_prefixes())}): for code of your own set LDM_ALLOW=yourpackage."
                    )
        for key, value in node.items():
            check_targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_targets(value, f"{path}[{i}]")


def read_node(path: Path) -> Any:
    """A YAML file as plain data, its interpolations resolved."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def build(node: Any, path: str = "config", **kwargs: Any) -> Any:
    """The object that a node describes, None for an empty node; `kwargs` are objects made elsewhere.

    Raises ConfigError for targets outside the allow-list and whatever ConfigError the object's constructor raises.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not plain:
        return None
    check_targets(plain, path)
    if kwargs:  # objects do not go through OmegaConf, which would copy them
        plain = {**plain, "_partial_": True}
    problems = check_node(path, plain)
    if problems:
        raise ConfigError(" ".join(problems))
    try:
        made = instantiate(DictConfig(plain), _convert_="all")
        return made(**kwargs) if kwargs else made
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        raise (cause or error) from None
