"""The texts of --help, made of the configuration folder and the root's keys: all of it, one task, one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path

from ldm.config.root import TASKS, Root
from ldm.errors import ConfigError, nearest

HEAD = """\
usage: python -m ldm.run [experiment=NAME] [task=TASK] [group=option ...] [key=value ...]

  python -m ldm.run experiment=quickstart                      shapes, trained and sampled on a laptop
  python -m ldm.run experiment=quickstart source=folder images=DIR name=mine
  python -m ldm.run task=sample checkpoint=outputs/mine prompt="a red star"
  python -m ldm.run task=convert checkpoint=sd15.ckpt format=diffusers output=sd15
  python -m ldm.run -m experiment=quickstart scheduler=cosine,flow     a sweep: outputs/<sweep>/results.csv

More: --help task=sample shows a task with its keys, --help sampler a group with its options.
Options: --cfg job prints the composed configuration, --config-dir DIR adds a folder of your own options,
-m sweeps over comma-separated values. Any value inside a group is a key too: optimizer.lr=1e-4.
"""


def help_text(conf: Path, asked: Sequence[str] = ()) -> str:
    """What --help prints, alone or with `task=NAME` or the name of a group. ConfigError for what there is not."""
    words = [a for a in asked if not a.startswith("-")]
    if not words:
        return _everything(conf)
    name = words[0].removeprefix("task=") if words[0].startswith("task=") else words[0].partition("=")[0]
    if name in TASKS:
        return _task(conf, name)
    groups = [f.name for f in fields(Root) if f.metadata.get("group")]
    if words[0].startswith("task=") or name not in groups:
        known = [*(f"task={t}" for t in TASKS), *groups]
        raise ConfigError(f"--help {words[0]}: there is no such task or group.{nearest(words[0], known)} See --help.")
    return _group(conf, name)


def said_of(file: Path) -> str:
    """The first comment line of an option's YAML, empty where it opens with none."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return lines[0].removeprefix("# ").rstrip(":") if lines and lines[0].startswith("# ") else ""


def _everything(conf: Path) -> str:
    lines = [HEAD, "tasks (task=NAME):"]
    lines += [f"  {task:<18}{_short(said_of(conf / 'task' / f'{task}.yaml'))}" for task in TASKS]
    lines += ["", "groups (group=option):"]
    lines += [_line(f) for f in fields(Root) if f.metadata.get("group") and f.name != "task"]
    shared = [f for f in fields(Root) if not f.metadata.get("group") and f.metadata["tasks"] == TASKS]
    return "\n".join([*lines, "", "keys of all tasks (key=value):", *(_line(f) for f in shared)])


def _task(conf: Path, task: str) -> str:
    read = [f for f in fields(Root) if task in f.metadata["tasks"]]
    lines = [f"task={task}: {said_of(conf / 'task' / f'{task}.yaml')}", "", "keys (key=value):"]
    lines += [_line(f) for f in read if not f.metadata.get("group")]
    return "\n".join([*lines, "", "groups (group=option):", *(_line(f) for f in read if f.metadata.get("group"))])


def _group(conf: Path, group: str) -> str:
    (about,) = (f for f in fields(Root) if f.name == group)
    lines = [f"{group}: {about.metadata['help']}", ""]
    files = sorted((conf / group).glob("*.yaml"))
    width = max(len(file.stem) for file in files) + 2
    lines += [f"  {group}={file.stem:<{width}}{said_of(file)}" for file in files]
    return "\n".join(lines)


def _line(f: Field) -> str:
    default = "" if f.default is None or not isinstance(f.default, (int, float, str)) else f" [{f.default}]"
    return f"  {f.name:<18}{f.metadata['help']}{default}"


def _short(text: str) -> str:
    """The first sentence."""
    return text.partition(": ")[0].partition(". ")[0].rstrip(".")
