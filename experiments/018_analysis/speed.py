"""Seconds of ldm.analysis over many synthetic runs: writes them, reads them, prints and saves a table.

python experiments/018_analysis/speed.py [runs] [records]
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from ldm.analysis import compare, diff, plot_loss, runs
from ldm.analysis.run import Run

HERE = Path(__file__).parent
TEMPLATE = HERE / "config.yaml"  # of a quickstart: as long as those of real runs


def write(folder: Path, number: int, records: int, config: dict) -> None:
    """A run directory with `records` records: training losses with four time bins, each tenth with a validation."""
    folder.mkdir()
    seeded = {**config, "seed": number, "optimizer": {**config["optimizer"], "lr": 0.001 * (1 + number % 5)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(seeded, sort_keys=False))
    (folder / "run.json").write_text(json.dumps({"digest": f"{number:08x}", "command": "synthetic"}))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 10 * records, "time": number}))
    draws = np.random.default_rng(number)
    lines = []
    for i in range(1, records + 1):
        line = {"step": 10 * i, "images": 320 * i, "time": 1e9 + i, "train/loss": 1 / i + 0.1 * draws.random()}
        line |= {f"train/loss_by_t/{k}": draws.random() for k in draws.choice(10, 4, replace=False)}
        line |= {"train/gradient_norm": draws.random(), "train/learning_rate": 1e-3}
        if i % 10 == 0:
            line |= {"val/loss": 1 / i, "val/loss_standard_error": 0.01}
            line |= {f"val/{kind}_by_t/{k}": draws.random() for kind in ("loss", "x0_error") for k in range(10)}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _timed(ask: Callable[[], object]) -> tuple[float, float]:
    began = time.perf_counter(), time.process_time()
    ask()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main(count: int = 200, records: int = 300) -> None:
    with tempfile.TemporaryDirectory() as place:
        outputs = Path(place) / "outputs"
        outputs.mkdir()
        config = yaml.safe_load(TEMPLATE.read_text())
        for number in range(count):
            write(outputs / f"run{number:04d}", number, records, config)
        first, second = outputs / "run0000", outputs / "run0001"
        asked = {
            f"runs, {count} runs of {records} records": lambda: runs(outputs / "*"),
            "Run.metrics": lambda: Run(first).metrics,
            "Run.loss_by_t": lambda: Run(first).loss_by_t(),
            "compare": lambda: compare(first, second),
            "diff": lambda: diff(first, second),
            "plot_loss of 2 runs, drawn": lambda: plot_loss([first, second], smooth=10).canvas.draw(),
        }
        rows = []
        for name, ask in asked.items():
            wall, cpu = zip(*(_timed(ask) for _ in range(5)), strict=True)
            rows.append((name, round(min(wall), 3), round(max(wall), 3), round(min(cpu), 3)))
            print(f"{name:<36}{min(wall):8.3f} s to {max(wall):.3f} s, {min(cpu):.3f} s of one core")
    with (HERE / "speed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["asked", "seconds, best of 5", "worst of 5", "of one core, best"])
        writer.writerows(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
