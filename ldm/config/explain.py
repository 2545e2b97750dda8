"""Errors of composition in one line: what was typed, why it cannot be, the nearest thing that can."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from ldm.config.choices import MANY
from ldm.config.schema import group_names, options, schema
from ldm.errors import ConfigError, nearest

MENU = 20  # names that fit a line
PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}  # launchers' extras
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_OURS = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def explain(error: BaseException) -> str | None:
    """One line for an error that the person can mend; None for one of ours, which keeps its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(_chain(error))
    for e in chain:
        if isinstance(e, ConfigError):
            return _one_line(str(e))
    if isinstance(error, OSError) and error.errno in _FULL and not error.filename:  # write() names no file
        return f"no room is left ({error.strerror}): free some on the disk, or give another outputs= or output= folder."
    if isinstance(error, OSError) and error.filename and error.errno in _NOT_OURS:
        return _one_line(f"{error.filename} cannot be read or written ({error.strerror}): give another path.")
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file is not YAML: {_one_line(str(error))}"
    if not any(isinstance(e, (HydraException, OmegaConfBaseException)) for e in chain):
        return None
    for e in chain:
        if getattr(e, "missing_cfg_file", None):
            return _missing_option(str(e.missing_cfg_file), list(getattr(e, "options", None) or []))  # type: ignore[attr-defined]
    text = " ".join(_one_line(str(e)) for e in chain)
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: ([\w.\[\]]+)", text)
    if "not in" in text and found:
        return _unknown_key(found.group(1))
    if "No match in the defaults list" in text and found:
        return _unknown_key(found.group(1))
    value = re.search(r"Value '([^']*)'[^.]*? could not be converted to (\w+)", text)
    if value and found:
        return f"{found.group(1)}={value.group(1)}: expected {value.group(2).lower()}."
    lacking = re.search(r"Interpolation key '([\w.]+)' not found", text)
    if lacking:
        key, group = lacking.group(1), lacking.group(1).partition(".")[0]
        return f"a value is ${{{key}}}, and the {group} chosen here has none: type that value, or another {group}=."
    if "is not Optional" in text and found:
        return f"{found.group(1)}=null: it needs a value."
    kind = re.search(r"Cannot assign (\w+) to (\w+)", text)
    if kind and found:
        return f"{found.group(1)}: expected {kind.group(2).lower()}, not {kind.group(1)}."
    override = getattr(error, "override", None)
    if override:
        return f"{override}: this cannot be read ({_one_line(str(error))}). Put the value in quotes: key='\"a, b\"'."
    return _one_line(str(chain[-1]) if len(str(chain[-1])) > 10 else str(error))


def _missing_option(missing: str, known: list[str]) -> str:
    group, _, option = missing.rpartition("/")
    if group == "hydra/launcher" and option in PLUGINS:
        return f"hydra/launcher={option} is not installed: pip install 'ldm[{PLUGINS[option]}]'."
    known = known or list(options(group))
    if not known:
        return f"{group or missing}={option}: there is no group of this name.{nearest(group, group_names())}"
    return f"{group}={option}: there is no such option.{nearest(option, known)} There is: {', '.join(known)}."


def _unknown_key(key: str) -> str:
    first, _, rest = key.partition(".")
    roots = list(schema())
    if first not in roots:
        return f"{first}= is no key and no group.{nearest(first, roots)} `python -m ldm.run --help` lists them all."
    files = list(options(first).values())
    if not rest:
        names = ", ".join(options(first))
        return f"{first}= takes the name of an option ({names}); what is in it is set by its keys, {first}.KEY=VALUE."
    if first in MANY and rest in options(first):
        return f"{key}: {first} has no '{rest}' yet: add it by +{first}@{key}={rest}, or have it alone, {first}={rest}."
    leaf = rest.split(".")[-1]
    having = [path.stem for path in files if leaf in _keys(path)]
    if having:
        return f"{key}: the {first} chosen here has no '{leaf}': choose one that has, {first}={'|'.join(having)}."
    known = sorted(set().union(*map(_keys, files)) - {"_target_", "_partial_", "defaults"})
    near = nearest(leaf, known) or (f" There is: {', '.join(known)}." if len(known) <= MENU else "")
    return f"{key}: {first} has no '{leaf}'.{near}"


def _keys(path: Path) -> set[str]:
    """All keys in a YAML, at any depth."""
    found: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.update(str(k) for k in node)
            for value in node.values():
                walk(value)

    walk(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
