"""Groups that are chosen to be nothing: `ema=none`, `ema=null`, and what an experiment has set inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.config.root import plain
from ldm.config.schema import group_names, options
from ldm.errors import ConfigError

NOTHING = ("null", "none", "[]")
EMPTY = ("none", "own")  # options of conf/ that leave a group empty, or to the model
MANY = ("adapter", "callbacks", "metric")  # groups of several nodes, each under its name
LISTS = ("adapter", "loss", "perturbation")  # of which any number is chosen
OF_THE_MODULE = {"loss": "losses", "perturbation": "perturbations"}  # whose options stand in the module's node
FREE = ("experiment", "debug")  # left out by default; local is none then
NO_NODES = (*FREE, "local", "task")


def said_in_words(argument: str) -> str:
    """`group=null`, `group=[]` and `group=none` as the option that the group has for it, in a sweep's list too.

    ConfigError where a group cannot be left out.
    """
    group, separator, value = argument.partition("=")
    if not separator or group not in group_names() or not set(value.split(",")) & set(NOTHING):
        return argument
    return f"{group}={','.join(_option(group, v) if v in NOTHING else v for v in value.split(','))}"


def _option(group: str, value: str) -> str:
    there = options(group)
    found = next((o for o in EMPTY if o in there), None)
    if found or group in (*FREE, *LISTS):
        return found or "[]"
    one = " (a single one is left out by name: callbacks.samples=null)" if group == "callbacks" else ""
    raise ConfigError(f"{group}={value}: it cannot be left out{one}. Choose one of {', '.join(there)}.")


def drop_leftovers(config: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Takes out of groups that are chosen to be nothing what an experiment or a default had set inside them.

    overrides: the command line; ConfigError where a key that would be dropped was typed there.
    """
    nodes = {g: node for g, node in plain(config).items() if g in set(group_names()) - set(NO_NODES)}
    for group, node in nodes.items():
        for key in node.keys() - _kept(group, node).keys() if isinstance(node, Mapping) else ():
            _drop(config, group, key, group, overrides)
    for group, key in OF_THE_MODULE.items():
        node = (nodes.get("module") or {}).get(key) or {}
        for name in [k for k, v in node.items() if isinstance(v, Mapping) and "_target_" not in v]:
            _drop(config, f"module.{key}", name, group, overrides)


def _drop(config: DictConfig, place: str, key: str, group: str, overrides: Sequence[str]) -> None:
    typed = [o for o in overrides if o.lstrip("+").startswith((f"{place}.{key}.", f"{place}.{key}="))]
    if typed:
        raise ConfigError(
            f"{typed[0]}: nothing is chosen for {group}= that could take it. Choose an option of {group}= too, "
            "or leave this out."
        )
    with open_dict(config):
        del OmegaConf.select(config, place)[key]


def _kept(group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    if group in MANY:
        if "_target_" in node:
            return dict(node)
        return {k: v for k, v in node.items() if v is None or (isinstance(v, Mapping) and "_target_" in v)}
    empty = _empty_option(group)
    if empty is None or node.get("_target_") != empty.get("_target_"):
        return dict(node)
    return {k: v for k, v in node.items() if k in empty}


@cache
def _empty_option(group: str) -> dict[str, Any] | None:
    """What stands in the group's none.yaml or own.yaml."""
    files = (file for name, file in options(group).items() if name in EMPTY)
    return next((yaml.safe_load(f.read_text(encoding="utf-8")) for f in files), None)
