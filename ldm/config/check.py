"""Values against the signatures they are meant for: every one that cannot be is said before anything is built."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.root import plain, reference
from ldm.config.schema import problems as key_problems
from ldm.config.schema import read_by, schema
from ldm.errors import ConfigError, nearest


def check(config: DictConfig, task: str | None = None) -> None:
    """Raises one ConfigError that lists every value which cannot be, before anything is built.

    task: its own groups alone are checked, because others may not know what this task's keys may be (a list of seeds).
    """
    others = set() if task is None else set(schema()) - read_by(task)
    problems = key_problems(config, task)  # type: ignore[arg-type]
    for name, node in plain(config).items():
        if name == "module" and name not in others:  # what it refers to is looked at where it stands
            said = OmegaConf.to_container(config.module, resolve=True)
            own = {k: said[k] for k, v in node.items() if reference(v) is None}  # type: ignore[index, call-overload]
            problems += check_node(name, {**own, "_partial_": True})
        elif isinstance(node, Mapping) and name not in others:
            problems += check_node(str(name), node)
    if problems:
        raise ConfigError(" ".join(problems))


def check_node(path: str, node: Mapping[str, Any]) -> list[str]:
    """Every `_target_` in a tree against its signature: unknown names, missing ones, values of another type."""
    problems = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            problems += check_node(f"{path}.{name}", value)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Mapping):
                    problems += check_node(f"{path}.{name}[{i}]", item)
    if "_target_" not in node:
        return problems
    target = locate(node["_target_"], path)
    parameters = inspect.signature(target).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _type_hints(target)
    for name, value in node.items():
        if name.startswith("_") and name.endswith("_"):
            continue
        if name not in parameters and not takes_more:
            problems.append(f"{path}.{name}: {node['_target_']} has no such argument.{nearest(name, list(parameters))}")
        elif not fits(value, hints.get(name, Any)):
            problems.append(f"{path}.{name}={value!r}: expected {_show(hints[name])}.")
    if not node.get("_partial_"):
        for name, parameter in parameters.items():
            required = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if required and name not in node:
                problems.append(f"{path}.{name} is missing: {node['_target_']} needs it.")
    return problems


def locate(target: str, path: str) -> Callable[..., Any]:
    """The class or function behind a `_target_`."""
    from hydra.utils import get_object

    try:
        return get_object(target)
    except Exception as error:
        raise ConfigError(f"{path}._target_={target}: there is no such class or function ({_cause(error)}).") from error


def module_kind(config: Mapping[str, Any]) -> str:
    """What a configuration trains, "latent_diffusion" or "autoencoder": the `kind` of its module's class."""
    return locate(config["module"]["_target_"], "module").kind  # type: ignore[attr-defined]


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can be meant for a parameter with this type hint; unknown hints accept everything."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, (str, typing.TypeVar)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is not None:
        return _fits_container(value, origin, args)
    if hint is type(None) or value is None:
        return hint is type(None) and value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(hint, type):
        return True
    if isinstance(value, list):
        return issubclass(hint, (list, tuple, Sequence)) and not issubclass(hint, str)
    return isinstance(value, hint) or (isinstance(value, str) and hint.__name__ in ("Path", "PathLike"))


def _fits_container(value: Any, origin: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(origin, type):
        return True
    if isinstance(value, list):
        if not issubclass(origin, (list, tuple, Sequence)) and origin is not typing.get_origin(typing.Iterable[int]):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args, strict=True))
        return all(fits(v, args[0]) for v in value) if args else True
    if isinstance(value, Mapping):
        return issubclass(origin, Mapping) or origin is dict
    return isinstance(value, origin)


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints that name things not importable here: the call itself will tell
        return {}


def _show(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")  # type: ignore[return-value]


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).split("\n")[0]
