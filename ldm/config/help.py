"""The text of --help, made of the configuration folder and the root's keys."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from ldm.config.root import TASKS, Root

HEAD = """\
usage: python -m ldm.run [experiment=NAME] [task=TASK] [group=option ...] [key=value ...]

  python -m ldm.run experiment=quickstart                      shapes, trained and sampled on a laptop
  python -m ldm.run experiment=quickstart source=folder images=DIR name=mine
  python -m ldm.run task=sample checkpoint=outputs/mine prompt="a red star"
  python -m ldm.run task=convert checkpoint=sd15.ckpt format=diffusers output=sd15
  python -m ldm.run -m experiment=quickstart scheduler=cosine,flow     a sweep: outputs/<sweep>/results.csv

Options: --cfg job prints the composed configuration, --config-dir DIR adds a folder of your own options,
-m sweeps over comma-separated values. Any value inside a group is a key too: optimizer.lr=1e-4.
"""


def help_text(conf: Path) -> str:
    lines = [HEAD, f"tasks: {', '.join(TASKS)}", "", "groups (group=option):"]
    for f in fields(Root):
        options = sorted(p.stem for p in (conf / f.name).glob("*.yaml"))
        if f.metadata.get("group") and options:
            lines += [f"  {f.name:<18}{f.metadata['help']}", f"  {'':<18}  {', '.join(options)}"]
    lines += ["", "keys (key=value), and the tasks that read them:"]
    for f in fields(Root):
        if not f.metadata.get("group"):
            default = "" if f.default is None or not isinstance(f.default, (int, float, str)) else f" [{f.default}]"
            tasks = "all tasks" if f.metadata["tasks"] == TASKS else ", ".join(f.metadata["tasks"])
            lines.append(f"  {f.name:<18}{f.metadata['help']}{default}  ({tasks})")
    return "\n".join(lines)
