"""Sweeps in which an arm diverges, one raises and one is killed by kill -9, under every launcher and under Optuna.

python experiments/016_sweeps/broken.py FOLDER [NAME ...] runs the sweeps (or those named) in a folder, prints what they
say, and writes broken.csv, a row an arm and command; rows of sweeps that were not run stay. Half an hour on two cores
beside other work: each arm is a process that imports torch.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
SWEEP = "experiment=quickstart debug=fast_dev_run logger=none stages.evaluate=false stages.report=false max_steps=6"
SWEEP += " callbacks.jump_to_x0=null callbacks.samples=null optimized_metric=val/loss"
CALLBACK = "{_target_: sabotage.Sabotage}"
NINE = "weighting=simple,min_snr,p2 seed=0,1,2"
SEARCH = "sweep=optuna sweep.n_trials={n} sweep.n_jobs=2 sweep.pruned_by=val/loss sweep.startup_trials=2"
SEARCH += " weighting=simple,min_snr optimizer.lr='tag(log, interval(1e-4, 1e-1))' hydra/launcher=processes"
BROKEN = {"Simple 1": "diverge", "MinSNR 0": "raise", "P2 2": "kill"}
COMMANDS = [  # name, what is typed, what is broken the first time, what is typed then
    ("processes", f"{NINE} hydra/launcher=processes sweep.n_jobs=2", BROKEN, None),
    ("joblib", f"{NINE} hydra/launcher=joblib sweep.n_jobs=2", BROKEN, None),
    ("submitit", f"{NINE} hydra/launcher=submitit_local", BROKEN, None),
    ("optuna", SEARCH.format(n=6), {"MinSNR 0": "kill"}, SEARCH.format(n=10)),
]


def main() -> None:
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or [name for name, *_ in COMMANDS]
    folder.mkdir(parents=True, exist_ok=True)
    table = HERE / "broken.csv"
    before = list(csv.DictReader(table.open())) if table.is_file() else []
    rows = [row for row in before if row["sweep"] not in chosen]
    for name, typed, broken, then in [c for c in COMMANDS if c[0] in chosen]:
        for attempt, what, sabotage in (("first", typed, broken), ("again", then or typed, {})):
            rows += attempted(folder, name, attempt, what, sabotage)
    with table.open("w", newline="") as file:
        written = csv.DictWriter(file, list(rows[0]))
        written.writeheader()
        written.writerows(rows)


def attempted(folder: Path, name: str, attempt: str, what: str, sabotage: dict[str, str]) -> list[dict]:
    """The rows of a command's arms."""
    words = ["-m", *shlex.split(SWEEP), f"+callbacks.sabotage={CALLBACK}", *shlex.split(what), f"name={name}"]
    before, started = trained(folder / "outputs" / name), time.monotonic()
    done = ldm(folder, words, sabotage)
    seconds, new = time.monotonic() - started, trained(folder / "outputs" / name) - before
    print(
        f"$ python -m ldm.run {shlex.join(words)}\n{done.stdout}{done.stderr}exit code {done.returncode}\n", flush=True
    )
    head = {"sweep": name, "command": attempt, "exit code": done.returncode, "seconds": round(seconds)}
    rows = []
    for arm in csv.DictReader((folder / "outputs" / name / "results.csv").open()):
        known = {k: arm.get(k, "") for k in ("weighting", "optimizer.lr", "seed", "state", "val/loss", "message")}
        rows.append({**head, **known, "trained now": new[Path(arm["directory"]).name]})
    return rows


def ldm(folder: Path, words: list[str], sabotage: dict[str, str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SABOTAGE": json.dumps(sabotage), "LDM_ALLOW": "sabotage"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "ldm.run", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def trained(sweep: Path) -> Counter:
    """How often each arm has begun to train, or gone on."""
    events = {f.parent.name: f.read_text() for f in sweep.glob("*/events.jsonl")}
    return Counter({arm: len(re.findall(r'"event": "(?:start|resume)"', text)) for arm, text in events.items()})


if __name__ == "__main__":
    main()
