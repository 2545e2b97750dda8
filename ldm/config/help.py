"""The texts of --help, made of the tasks' keys and the folders of options: all of it, one task, one group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.config.keys import Task
from ldm.config.schema import FIRST, Key, group_names, keys_of, options, schema, tasks
from ldm.errors import ConfigError, nearest

HEAD = """\
usage: python -m ldm.run [experiment=NAME] [task=TASK] [group=option ...] [key=value ...]

  python -m ldm.run experiment=quickstart                      shapes, trained and sampled on a laptop
  python -m ldm.run experiment=quickstart source=folder images=DIR name=mine
  python -m ldm.run task=sample checkpoint=outputs/mine prompt="a red star"
  python -m ldm.run task=convert checkpoint=sd15.ckpt format=diffusers output=sd15
  python -m ldm.run -m experiment=quickstart scheduler=cosine,flow     a sweep: outputs/<sweep>/results.csv

More: --help task=sample shows a task with its keys, --help sampler a group, --help sampler=heun what an option sets.
Options: --cfg job prints the composed configuration, --config-dir DIR adds a folder of your own options,
-m sweeps over comma-separated values. Any value inside a group is a key too: optimizer.lr=1e-4.
"""


def help_text(asked: Sequence[str] = ()) -> str:
    """What --help prints, alone or with `task=NAME`, a group or `group=option`. ConfigError for what there is not."""
    if not asked:
        return _everything()
    name = asked[0].removeprefix("task=") if asked[0].startswith("task=") else asked[0].partition("=")[0]
    if name in tasks():
        return _task(name)
    if asked[0].startswith("task=") or name not in group_names():
        known = [*(f"task={t}" for t in tasks()), *group_names()]
        raise ConfigError(f"--help {asked[0]}: there is no such task or group.{nearest(asked[0], known)} See --help.")
    chosen = options(name).get(asked[0].partition("=")[2])
    return _group(name) if chosen is None else f"{asked[0]}: {said_of(chosen)}\n\n{_body(chosen)}"


def said_of(file: Path) -> str:
    """The first comment line of an option's YAML, empty where it opens with none."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return lines[0].removeprefix("# ").rstrip(":") if lines and lines[0].startswith("# ") else ""


def _everything() -> str:
    files, shared = options("task"), keys_of(Task)
    lines = [HEAD, f"tasks (task=NAME; {FIRST} where none is named):"]
    lines += [f"  {task:<18}{_short(said_of(files[task]))}" for task in tasks()]
    lines += ["", "groups (group=option):"]
    lines += [_line(k) for k in schema().values() if k.is_group and k.name != "task"]
    return "\n".join([*lines, "", "keys of all tasks (key=value):", *(_line(k) for k in _without_groups(shared))])


def _task(task: str) -> str:
    read = keys_of(tasks()[task])
    lines = [f"task={task}: {said_of(options('task')[task])}", "", "keys (key=value):"]
    lines += [_line(k) for k in _without_groups(read)]
    return "\n".join([*lines, "", "groups (group=option):", *(_line(k) for k in read.values() if k.is_group)])


def _group(group: str) -> str:
    files = options(group)
    width = max(map(len, files), default=0) + 2
    lines = [f"  {group}={name:<{width}}{said_of(file)}" for name, file in files.items()]
    return "\n".join([f"{group}: {schema()[group].about['help']}", "", *lines])


def _body(file: Path) -> str:
    """What an option sets: each line is a key, group.key=value."""
    return "\n".join(f"  {line}" for line in file.read_text(encoding="utf-8").splitlines() if line[:1] != "#")


def _without_groups(keys: dict[str, Key]) -> list[Key]:
    return [k for k in keys.values() if not k.is_group]


def _line(key: Key) -> str:
    shown = key.default is not None and isinstance(key.default, (int, float, str))
    default, bounds = f" [{key.default}]" if shown else "", f" ({key.bounds})" if key.bounds else ""
    return f"  {key.name:<18}{key.about['help']}{default}{bounds}"


def _short(text: str) -> str:
    """The first sentence."""
    return text.partition(": ")[0].partition(". ")[0].rstrip(".")
