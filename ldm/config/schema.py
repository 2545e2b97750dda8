"""The schema of every configuration: the keys of all tasks together, in conf/ and in the folders beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from functools import cache
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ldm.config.keys import Task, key
from ldm.config.root import allowed_by_user, conf_dir, within
from ldm.errors import ConfigError, nearest

FIRST = "train"  # the task that is done where none is named

_folders: list[Path] = []  # of --config-dir
_TASK = f"{Task.__module__}.{Task.__name__}"


def register(*folders: Path) -> None:
    """Makes the keys of all tasks the schema that conf/config.yaml starts from; `folders` may add tasks and options.

    Raises ConfigError for a task that is none, and for two that do not agree on a key.
    """
    from hydra.core.config_store import ConfigStore

    look_in(*folders)
    made = [(k.name, k.type, k.field()) for k in schema().values()]
    ConfigStore.instance().store(name="root", node=make_dataclass("Root", made))


def looked_in() -> list[Path]:
    """The folders beside conf/."""
    return list(_folders)


def look_in(*folders: Path) -> None:
    """Also looks for tasks and options in `folders`, as Hydra does with --config-dir."""
    found = [f for folder in folders if (f := folder.resolve()) != conf_dir()]
    if found != _folders:
        _folders[:] = found
        tasks.cache_clear()
        schema.cache_clear()


def options(group: str) -> dict[str, Path]:
    """The options of a group, by name: files of conf/ and of the folders beside it."""
    found: dict[str, Path] = {}
    for folder in (conf_dir(), *_folders):
        for file in sorted((folder / group).glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


@cache
def tasks() -> dict[str, type[Task]]:
    """Every task by its name, the usual one first."""
    found = {}
    for name, file in options("task").items():
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        found[name] = task_class(name, str(node.get("_target_", "")) if isinstance(node, dict) else "")
    return {FIRST: found[FIRST], **found}


def task_class(name: str, target: str) -> type[Task]:
    """The task that a `_target_` names. ConfigError where it names none."""
    module, _, attribute = target.rpartition(".")
    if not within(target, ("ldm", *allowed_by_user())):
        raise ConfigError(f"task={name}: its _target_={target} is not ours: for code of your own, LDM_ALLOW={module}.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(f"task={name}: its _target_={target} is not found ({error}): set PYTHONPATH.") from error
    except Exception as error:
        raise ConfigError(f"task={name}: its _target_={target} cannot be imported ({error}).") from error
    if not (isinstance(found, type) and issubclass(found, Task) and is_dataclass(found)):
        raise ConfigError(f"task={name}: its _target_={target} is no dataclass of keys that inherits {_TASK}.")
    return found


@dataclass(frozen=True)
class Key:
    """A top-level key or group of the schema."""

    name: str
    type: Any
    default: Any
    about: dict[str, Any]
    readers: tuple[str, ...]  # names of tasks

    @property
    def is_group(self) -> bool:
        return bool(self.about.get("group"))

    @property
    def kind(self) -> str:
        """Type and default, in words."""
        return f"{getattr(self.type, '__name__', self.type)}, by default {self.default}"

    def field(self) -> Any:
        return key(self.default, "")

    def problem(self, value: Any) -> str | None:
        """Why the value cannot be; None where it can, or where it is left open."""
        choices, least, most = (self.about.get(word) for word in ("choices", "least", "most"))
        if value is None:
            return None
        if choices and value not in choices:
            leave = ", or leave it out" if self.default is None else ""
            return f"{self.name}={value}: choose {', '.join(choices[:-1])} or {choices[-1]}{leave}."
        if (least is not None and not value >= least) or (most is not None and not value <= most):
            return f"{self.name}={value}: must be {self.bounds}."
        return None

    @property
    def bounds(self) -> str:
        """In words; empty where there are none."""
        least, most = self.about.get("least"), self.about.get("most")
        if least is not None and most is not None:
            return f"from {least} to {most}"
        return f"at least {least}" if least is not None else f"at most {most}" if most is not None else ""


def keys_of(task: type[Task]) -> dict[str, Key]:
    """The keys that a task reads: its own first, then what it shares with others, then what all tasks read."""
    hints, own = get_type_hints(task), {f.name: f for f in fields(task)}
    order = dict.fromkeys(n for c in task.__mro__ for n in get_annotations(c) if n in own)
    return {n: _key(n, hints[n], own[n]) for n in order}


def _key(name: str, hint: Any, found: Any) -> Key:
    default = {} if found.default_factory is dict else found.default
    return Key(name, hint, default, dict(found.metadata), ())


@cache
def schema() -> dict[str, Key]:
    """Every key that any task reads, with its readers. Anything else, typed or in an experiment, is refused."""
    merged: dict[str, Key] = {}
    for task, kind in tasks().items():
        for name, new in keys_of(kind).items():
            old = merged.get(name, new)
            if (old.type, old.default, old.is_group) != (new.type, new.default, new.is_group):
                raise ConfigError(
                    f"{name}= of task={task} is {new.kind}, and of task={old.readers[0]} {old.kind}: keys of one name "
                    "have one type and one default, so give one another name."
                )
            merged[name] = Key(name, old.type, old.default, old.about, (*old.readers, task))
    return merged


def group_names() -> list[str]:
    return [k.name for k in schema().values() if k.is_group]


def read_by(task: str) -> set[str]:
    """Names of the keys that a task reads."""
    return {k.name for k in schema().values() if task in k.readers}


def problems(config: Mapping[str, Any], task: str | None = None) -> list[str]:
    """What cannot be among the values of keys: of those that a task reads, by its own rules, or of all."""
    keys = schema() if task is None else keys_of(tasks()[task])
    return [said for name, key in keys.items() if (said := key.problem(config.get(name)))]


def read_by_task_of(config: Mapping[str, Any]) -> set[str]:
    """Names of the keys that a configuration's own task reads; where it names none of today's, those of the usual."""
    named = (config.get("task") or {}).get("_target_")
    return read_by(next((t for t, kind in tasks().items() if f"{kind.__module__}.{kind.__name__}" == named), FIRST))


def check_keys_are_read(task: str, overrides: Sequence[str]) -> None:
    """Refuses a command-line key that `task` does not read, naming the tasks that do."""
    known = schema()
    for override in overrides:
        name = override.lstrip("+~").split("=", 1)[0].split(".")[0].split("@")[0].split("/")[0]
        if name.startswith("hydra"):
            continue
        if name not in known:
            raise ConfigError(f"{name}= is no key and no group.{nearest(name, list(known))} See --help.")
        if task not in known[name].readers:
            readers = ", ".join(f"task={t}" for t in known[name].readers)
            raise ConfigError(f"{name}= is not read by task={task}, but by {readers}: leave it out.")
