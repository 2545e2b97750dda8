"""Kills, damages and signals, many of each: what a run is afterwards.

python experiments/013_stopping/run.py [--points 30] [--kills 200] [--signals 20] [--only NAME]

Processes are forked from this one, as in the tests, so that a start takes a second; the runs are the tests' tiny ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests/support"))
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from commands import children, lives, metrics, wait_for  # noqa: E402
from commands import start as started_command  # noqa: E402
from ranks import free_port  # noqa: E402
from tiny_training import TINY, Spy, config, fingerprint, make_data, watched  # noqa: E402

from ldm.checkpoints.folder import all_folders, find, newest, verify  # noqa: E402
from ldm.errors import ConfigError  # noqa: E402
from ldm.training.distributed import processes  # noqa: E402
from ldm.training.run import checkpoint_io  # noqa: E402
from ldm.training.run.fit import train_run  # noqa: E402

FORK = multiprocessing.get_context("fork")
STEPS = ["max_steps=12", "callbacks.checkpoints.every_n_steps=3", "callbacks.validation.every_n_steps=3"]
STEPS += ["callbacks.jump_to_x0=null", "callbacks.samples.every_n_steps=6", "lr_scheduler=constant"]


class Deadly(Spy):
    """kill -9 of this process at a hook of a step."""

    def __init__(self, point: tuple[str, int] | None, rank: int):
        super().__init__()
        self.point, self.rank = point, rank

    def _maybe_die(self, hook: str, trainer: Any) -> None:
        if self.point == (hook, trainer.global_step) and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def start(settings: dict[str, Any], folder: Path, world: int, spy: Any = None, before: Any = None) -> list[Any]:
    """The processes of a run, started."""
    port, started = free_port(), []

    def work(rank: int) -> None:
        sys.stdout = sys.stderr = (folder.parent / f"{folder.name}-{rank}.log").open("a")
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GROUP_RANK="0")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if before is not None:
            before()
        code = 1
        try:
            with watched(pytest.MonkeyPatch, spy or Spy()), processes.together(20):
                train_run(settings, lambda digest: folder)
            code = 0
        except BaseException as error:
            code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        os._exit(code)

    for rank in range(world):
        process = FORK.Process(target=work, args=(rank,))
        process.start()
        started.append(process)
    return started


def ended(started: list[Any], seconds: float = 60) -> list[int | None]:
    """Exit codes; whoever is left after the time is killed: None."""
    until, codes = time.monotonic() + seconds, []
    for process in started:
        process.join(max(0.1, until - time.monotonic()))
        codes.append(process.exitcode)
        if process.is_alive():
            process.kill()
            process.join()
    return codes


ADVERSARIAL = ["module=autoencoder", "loss=[perceptual_random,adversarial]", "module.losses.adversarial.start=6"]
ADVERSARIAL += ["module.losses.adversarial.discriminator.width=8", "perturbation=[equivariance,noise]", "ema=decay"]


def kill_points(
    root: Path, shards: Path, points: int, what: str = "", more: Sequence[str] = (), worlds: Sequence[int] = (1, 2)
) -> list[dict[str, Any]]:
    """A kill -9 at a hook of a step, of one process or of one of two; then the same again to the end."""
    rows = []
    for world in worlds:
        asked = [f"shards={shards}", *STEPS, f"batch_size={4 // world}", "trainer.strategy=auto", *more]
        settings, whole = config(*asked), root / f"whole-{world}{what}"
        assert ended(start(settings, whole, world)) == [0] * world
        hooks = [(hook, step) for step in range(1, 13) for hook in ("batch_start", "backward", "batch_end")]
        chosen = random.Random(0).sample(
            [p for p in hooks if p != ("batch_start", 12) and p != ("backward", 12)], points
        )
        differing = hung = 0
        for i, point in enumerate(chosen):
            run = root / f"killed-{world}{what}-{i}"
            codes = ended(start(settings, run, world, Deadly(point, i % world)))
            hung += None in codes
            assert codes[i % world] == -9, (point, codes)
            codes = ended(start(settings, run, world))
            same = codes == [0] * world and metrics(run) == metrics(whole)
            same = same and fingerprint(all_folders(run)[-1]) == fingerprint(all_folders(whole)[-1])
            differing += not same
            shutil.rmtree(run, ignore_errors=True)
        rows.append(
            {"case": f"kill -9 at a point, {world} process(es){what}", "tried": points, "bad": differing, "hung": hung}
        )
    return rows


def kills_during_saves(root: Path, latents: Path, kills: int) -> list[dict[str, Any]]:
    """A kill -9 at a random moment of a save; what is found then verifies, and is not older than the save before."""
    rows = []
    for background in (True, False):
        asked = [
            f"shards={latents}",
            "max_steps=100000",
            "callbacks.checkpoints.every_n_steps=2",
            "lr_scheduler=constant",
        ]
        asked += ["callbacks.validation=null", "callbacks.samples=null", "callbacks.jump_to_x0=null"]
        settings = config(
            *asked, f"callbacks.checkpoints.in_background={str(background).lower()}", "callbacks.losses=null"
        )
        run, chance, bad, torn, done = root / f"saves-{background}", random.Random(1), 0, 0, 0
        reader, writer = FORK.Pipe(duplex=False)

        def announced(writer: Any = writer) -> None:
            original = checkpoint_io.write

            def write(folder: Path, *rest: Any) -> None:
                began = time.monotonic()
                writer.send(("begins", int(folder.name.split("-")[1]), began))
                original(folder, *rest)
                writer.send(("ends", int(folder.name.split("-")[1]), time.monotonic() - began))

            checkpoint_io.write = write

        saved, takes = 0, 0.1
        while done < kills // 2:
            (process,) = start(settings, run, 1, before=announced)
            skip = chance.randrange(1, 3)  # saves before the fatal one
            while True:
                what, step, number = reader.recv()
                if what == "ends":
                    saved, takes, skip = step, number, skip - 1
                elif skip <= 0:
                    time.sleep(chance.random() * 1.1 * takes)
                    break
            process.kill()
            process.join()
            while reader.poll():
                what, step, _ = reader.recv()
                saved = step if what == "ends" else saved
            done += 1
            torn += bool(list((run / "checkpoints").glob("*.part")))
            problems: list[str] = []
            found = newest(run, problems.append)
            bad += found is None or bool(problems) or int(found.name.split("-")[1]) < saved
        rows.append(
            {
                "case": f"kill -9 in a save, in_background={background}",
                "tried": done,
                "bad": bad,
                "left half-written": torn,
            }
        )
    return rows


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda p: os.truncate(p, p.stat().st_size // 2),
    "a bit": _flip,
    "empty": lambda p: os.truncate(p, 0),
    "gone": lambda p: p.unlink(),
    "a page of HTML": lambda p: p.write_text("<!DOCTYPE html><html>not found</html>"),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "longer": lambda p: p.open("ab").write(b"more"),
    "a pickle": lambda p: torch.save({"a": torch.zeros(3)}, p),
}


def damages(root: Path, latents: Path) -> list[dict[str, Any]]:
    """Each damage to each of three files of the newest checkpoint: passed over by name, refused by its path."""
    run, rows = root / "damaged", []
    assert ended(start(config(f"shards={latents}", *STEPS), run, 1)) == [0]
    before, last = all_folders(run)[-2:]
    for place in ("unet.safetensors", "state/tensors.safetensors", "state.pt"):
        bad = 0
        for damage in DAMAGES.values():
            kept = root / "kept"
            shutil.copytree(last, kept)
            damage(last / place)
            said: list[str] = []
            silent = newest(run, said.append) != before or not any(place in line for line in said)
            try:
                find(last)
                silent = True
            except ConfigError:
                pass
            bad += silent
            shutil.rmtree(last)
            kept.rename(last)
        assert verify(last) is None
        rows.append({"case": f"damage to {place}", "tried": len(DAMAGES), "bad": bad})
    return rows


def signals(root: Path, latents: Path, times: int) -> list[dict[str, Any]]:
    """A signal to one of two processes: both stop after the same step, saved, with 75 or 130, and nobody is left."""
    rows, chance = [], random.Random(2)
    asked = [f"shards={latents}", "max_steps=100000", "callbacks.validation=null", "callbacks.samples=null"]
    settings = config(
        *asked, "callbacks.jump_to_x0=null", "batch_size=2", "trainer.strategy=auto", "lr_scheduler=constant"
    )
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)):
        run, bad, slowest = root / f"signal-{number}", 0, 0.0
        for i in range(times):
            started = start(settings, run, 2)
            steps = run / "metrics.jsonl"
            size, until = steps.stat().st_size if steps.is_file() else 0, time.monotonic() + 60
            while not (steps.is_file() and steps.stat().st_size > size) and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(chance.random() * 0.3)
            began = time.monotonic()
            os.kill(started[i % 2].pid, number)
            codes = ended(started, 30)
            slowest = max(slowest, time.monotonic() - began)
            status = json.loads((run / "status.json").read_text())
            saved = int(all_folders(run)[-1].name.split("-")[1])
            bad += codes != [code] * 2 or saved != status["step"] or verify(all_folders(run)[-1]) is not None
        rows.append(
            {"case": f"{number.name} to one of two", "tried": times, "bad": bad, "slowest s": round(slowest, 2)}
        )
    return rows


def signals_to_commands(root: Path, latents: Path, times: int) -> list[dict[str, Any]]:
    """A signal to `ldm.run trainer.devices=2` and, every second time, to one of its processes: the same is asked."""
    rows, chance = [], random.Random(3)
    typed = [t for t in TINY if not t.startswith("trainer")] + ["trainer.accelerator=cpu", "trainer.devices=2"]
    typed += ["callbacks.samples=null", "callbacks.jump_to_x0=null", "callbacks.validation=null", f"shards={latents}"]
    typed += ["lr_scheduler=constant", "max_steps=100000", "callbacks.checkpoints.every_n_steps=50"]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75)):
        run, bad, slowest = root / f"outputs/launched-{number}", 0, 0.0
        for i in range(times):
            before = run / "metrics.jsonl"
            size = before.stat().st_size if before.is_file() else 0
            process = started_command(*typed, f"name={run.name}", cwd=root)
            wait_for(lambda before=before, size=size: before.is_file() and before.stat().st_size > size)
            pids = children(process.pid)
            time.sleep(chance.random() * 0.3)
            began = time.monotonic()
            os.kill([process.pid, pids[i // 2 % 2]][i % 2], number)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            slowest = max(slowest, time.monotonic() - began)
            status = json.loads((run / "status.json").read_text())
            saved = int(all_folders(run)[-1].name.split("-")[1])
            wrong = process.returncode != code or any(map(lives, pids)) or saved != status["step"]
            bad += wrong or verify(all_folders(run)[-1]) is not None
        row = {"case": f"{number.name} to the command, or one of its two", "tried": times, "bad": bad}
        rows.append({**row, "slowest s": round(slowest, 2)})
    return rows


def waits(root: Path, latents: Path) -> list[dict[str, Any]]:
    """How long training stands still for a checkpoint of 100 million weights, their average and AdamW's state."""
    weights = {f"model.{i}": torch.randn(5_000_000) for i in range(20)}
    moments = {i: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for i, w in enumerate(weights.values())}
    average = {name: w.clone() for name, w in weights.items()}
    rows = []
    for background in (False, True):
        io = checkpoint_io.FolderCheckpointIO({"unet": "model"}, ["unet"], "config: {}")
        io.in_background = background
        for i in range(2):  # the first one takes the memory of the copies
            state = {"global_step": i, "state_dict": weights, "ema": average, "optimizer_states": [{"state": moments}]}
            began = time.monotonic()
            io.save_checkpoint(state, root / f"waits-{background}" / f"step-{i:08d}")
            stood = time.monotonic() - began
            io.wait()
            written = time.monotonic() - began
        case = f"1.6 GB saved, in_background={background}"
        rows.append({"case": case, "training waits s": round(stood, 2), "written after s": round(written, 2)})
        shutil.rmtree(root / f"waits-{background}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("points", 30), ("kills", 200), ("signals", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="stopping-"))
    shards, _, latents = make_data(root)
    cases: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "waits": lambda: waits(root, latents),
        "damages": lambda: damages(root, latents),
        "signals": lambda: signals(root, latents, asked.signals),
        "commands": lambda: signals_to_commands(root, latents, asked.signals),
        "points": lambda: kill_points(root, latents, asked.points),
        "adversarial": lambda: kill_points(root, shards, 10, ", an adversarial autoencoder", ADVERSARIAL, (1,)),
        "saves": lambda: kills_during_saves(root, latents, asked.kills),
    }
    table = []
    for name, case in cases.items():
        if asked.only in ("", name):
            began = time.monotonic()
            for row in case():
                table.append({**row, "seconds": round(time.monotonic() - began), "torch": torch.__version__})
                print(table[-1], flush=True)
    machine = f"{os.cpu_count()} shared cores, {platform.system()}"
    table = [{**row, "machine": machine} for row in table]
    with (HERE / "results.csv").open(newline="") as file:  # what was not run now stays
        done = {row["case"] for row in table}
        table = [row for row in csv.DictReader(file) if row["case"] not in done] + table
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)))
        writer.writeheader()
        writer.writerows(table)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
