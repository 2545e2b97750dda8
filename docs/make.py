"""Writes docs/options.md, every option of every group with the first comment line of its file: python docs/make.py."""

from pathlib import Path

from ldm.config.help import said_of

DOCS = Path(__file__).parent
CONF = DOCS.parent / "conf"
HEAD = """\
# Options

Every group of `conf/` and every option in it, chosen by `group=option`. Written by `python docs/make.py`.
What a file sets is a key too: `group.key=value`.
"""


def options() -> str:
    """The text of options.md."""
    lines = [HEAD]
    for group in sorted(p for p in CONF.iterdir() if p.is_dir() and p.name not in ("local", "hydra")):
        lines += [f"## {group.name}", "", "| option | is |", "|---|---|"]
        lines += [f"| `{p.stem}` | {said_of(p).replace('|', chr(92) + '|')} |" for p in sorted(group.glob("*.yaml"))]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "options.md").write_text(options())
