"""The table of a sweep: one row an arm, whatever became of it."""

from __future__ import annotations

import csv
import fcntl
import json
from pathlib import Path
from typing import Any

from ldm.training.run_directory import in_json

ROWS, TABLE = "results.jsonl", "results.csv"


def record(
    sweep: Path, overrides: list[str], directory: str, state: str, metrics: dict[str, float], message: str
) -> None:
    """Adds an arm's row and writes the table anew; arms that run side by side take turns. A repeated arm replaces."""
    sweep.mkdir(parents=True, exist_ok=True)
    row = {"overrides": overrides, "directory": directory, "state": state, "metrics": metrics, "message": message}
    row = in_json(row)
    with (sweep / ROWS).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()
        file.seek(0)
        rows = {tuple(r["overrides"]): r for r in map(json.loads, file)}
        _write_table(sweep / TABLE, list(rows.values()))


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    keys = _ordered(k for r in rows for k in (o.split("=", 1)[0] for o in r["overrides"]))
    metrics = _ordered(k for r in rows for k in r["metrics"])
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "state", *metrics, "message", "directory"])
        for r in rows:
            given = dict(o.split("=", 1) for o in r["overrides"])
            cells = [given.get(k, "") for k in keys]
            values = [r["metrics"].get(m, "") for m in metrics]
            writer.writerow([*cells, r["state"], *values, r["message"], r["directory"]])
    part.replace(path)


def _ordered(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
