"""What a configuration out of a file may build: it is somebody else's data, judged before it is used.

It may name only the classes and functions that conf/ itself names in that place, and those that LDM_ALLOW names.
Names are judged before anything is imported, and text stays text: nothing in it is resolved.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldm.build import MARKS
from ldm.config.check import locate
from ldm.config.root import allowed_by_user, conf_dir
from ldm.errors import ConfigError
from ldm.untrusted import read_yaml, shown

# The groups that are built from a file: the model itself, what it is drawn with, and its adapters by their names.
BUILT = (
    *("model", "autoencoder", "text_encoder", "scheduler", "parameterization"),
    *("sampler", "grid", "guider", "adapter"),
)
TAKES = {"callbacks": ("metric", "sampler", "grid", "guider")}  # whose nodes stand in another's: callbacks.scores
# Nodes that an option of conf/ takes and its own file leaves out: (parent, argument) -> target -> whether _partial_.
OPTIONAL = {
    ("ldm.diffusion.samplers.euler.euler", "churn"): {"ldm.diffusion.samplers.churn.Churn": False},
    ("ldm.diffusion.samplers.heun.heun", "churn"): {"ldm.diffusion.samplers.churn.Churn": False},
    ("ldm.diffusion.samplers.solver.Solver", "limit"): {
        "ldm.diffusion.thresholding.clip": True,
        "ldm.diffusion.thresholding.dynamic": True,
    },
}


def read_allowed(path: Path) -> dict[str, Any]:
    """config.yaml of a checkpoint folder or run, from which `ldm.build.build` may build."""
    return only_allowed(read_yaml(path), path)


def only_allowed(config: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """A copy of a file's configuration from which `ldm.build.build` may build. ConfigError names what it must not say.

    Groups that nothing builds from a file (trainer, callbacks ...) lose the names that conf/ does not give there.
    """
    judged = copy.deepcopy(dict(config))
    for group in BUILT:
        node = judged.get(group)
        if node is None or node in ({}, []):
            continue
        several = group == "adapter" and isinstance(node, dict)
        for where, one in {f"{group}.{k}": v for k, v in node.items()}.items() if several else ((group, node),):
            if group == "guider" and isinstance(one, dict) and "_target_" not in one:  # own: changes the usual one
                refuse_nodes(one, f"{source}: {where}")
                continue
            if not isinstance(one, dict) or "_target_" not in one:
                raise ConfigError(f"{source}: {where} is {shown(one)}, and no node with a _target_.")
            _judge(one, ("", ""), group, f"{source}: {where}")
    for key in ("data", "scheduler_config"):  # what is read of a file's, and not built
        if not isinstance(judged.get(key), dict | None):
            raise ConfigError(f"{source}: {key} is {shown(judged[key])}, and a mapping belongs there. Fetch it again.")
    for group in judged.keys() - set(BUILT):
        places = [p for g in (str(group), *TAKES.get(str(group), ())) for p in _named_by_conf(g).values()]
        _strip(judged[group], {target for place in places for target in place})
    return judged


def refuse_nodes(values: Any, source: Path | str) -> None:
    """ConfigError for a `_target_` in data that never describes objects, as other programs' JSON."""
    for node in _mappings(values):
        if "_target_" in node:
            raise ConfigError(f"{source} names code to run (_target_: {shown(node['_target_'])}): it is not read.")


def _judge(node: dict[Any, Any], place: tuple[str, str], group: str, where: str) -> None:
    """place: the target that takes this node, and its argument; of a group's own node both are empty."""
    target = node.get("_target_")
    if "_target_" in node:
        here = _named_by_conf(group).get(place, {}) | OPTIONAL.get(place, {})
        if not isinstance(target, str) or (target not in here and not _is_users(target, where)):
            raise ConfigError(
                f"{where} names {shown(target, 120)}, which conf/ does not name there, so a file may not build it. "
                "If it is code of your own that you trust: LDM_ALLOW=yourpackage."
            )
        if target in here and bool(node.get("_partial_", False)) != here[target]:
            raise ConfigError(f"{where}._partial_={shown(node.get('_partial_'))}: conf/ has it the other way.")
    for key, value in node.items():
        if not isinstance(key, str) or (key.startswith("_") and key.endswith("_") and key not in MARKS):
            raise ConfigError(f"{where}: {shown(key)} is no argument that a file may give.")
        # What stands in a mapping without a target stands in the argument that the mapping is given as.
        inside = (target, key) if isinstance(target, str) else place
        for mapping in _outermost(value):
            _judge(mapping, inside, group, f"{where}.{key}")


def _is_users(target: str, where: str) -> bool:
    """Whether LDM_ALLOW names it, and it is a class or function of that very package."""
    within = [p for p in allowed_by_user() if target == p or target.startswith(f"{p}.")]
    if not within:
        return False
    found = locate(target, where)
    if not (inspect.isclass(found) or inspect.isfunction(found)) or "." in found.__qualname__:
        return False
    # A name of the package's own may have been written deeper inside it: mine.Net is mine.networks.Net.
    packages = {p if p != target else p.split(".")[0] for p in within}
    return any(found.__module__ == p or found.__module__.startswith(f"{p}.") for p in packages)


@cache
def _named_by_conf(group: str) -> dict[tuple[str, str], dict[str, bool]]:
    """What the files of conf/<group>/ name, and where: (parent, argument) -> target -> whether it is _partial_."""
    table: dict[tuple[str, str], dict[str, bool]] = {}

    def walk(value: Any, place: tuple[str, str]) -> None:
        for node in _outermost(value):
            target = node.get("_target_")
            if target is not None:
                table.setdefault(place, {})[target] = bool(node.get("_partial_", False))
            for key, item in node.items():
                walk(item, (target, key) if target is not None else place)

    for path in sorted((conf_dir() / group).glob("*.yaml")) if group.isidentifier() else ():
        walk(yaml.safe_load(path.read_text(encoding="utf-8")), ("", ""))
    return table


def _outermost(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _outermost(item)


def _mappings(value: Any) -> Iterator[dict[Any, Any]]:
    for mapping in _outermost(value):
        yield mapping
        for item in mapping.values():
            yield from _mappings(item)


def _strip(value: Any, kept: set[str]) -> None:
    for node in _mappings(value):
        if "_target_" in node and not (isinstance(node["_target_"], str) and node["_target_"] in kept):
            del node["_target_"]
