"""Every case of tests/support/malformed.py through its command, in a process of its own: code, line, seconds, memory.

python experiments/009_malformed/run.py [words of names]   writes malformed.csv beside itself; exit 1 if one case fails
"""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests" / "support")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import malformed  # noqa: E402

SECONDS, MEBIBYTES = 15, 1024  # what a refusal may take; memory above that of the process before
GUARD = 12 * 2**30  # bytes of addresses: a case that asks for more ends there and not with the machine


def commands(path: Path, base: Path) -> dict[str, list[str]]:
    """What is typed, by door."""
    sample = ["task=sample", "prompt=a red star", "num_steps=1", "output=pictures"]
    return {
        "sample": [*sample, f"checkpoint={path}"],
        "adapter": [*sample, f"checkpoint={base / 'pipe'}", f"adapters={path}"],
        "convert": ["task=convert", f"checkpoint={path}", "format=ldm", "output=out"],
        "convert_adapter": ["task=convert", f"checkpoint={path}", "format=peft", "output=out.safetensors"],
        "merge": ["task=merge", f"checkpoints=[{path},{path}]", "output=out"],
        "train": ["experiment=finetune", f"checkpoint={path}", f"images={base}"],
        "evaluate": ["task=evaluate", f"checkpoint={path}"],
        "encode": ["task=encode", f"checkpoint={path}", f"shards={base}"],
    }


def act(door: str, path: Path, base: Path) -> int:
    """Goes through a door; the exit code that a program gets."""
    from ldm.errors import ConfigError
    from ldm.pipeline import Pipeline
    from ldm.run import run

    try:
        if door == "load":
            Pipeline.load(path)("a red star", num_steps=1)
        elif door == "attach":
            Pipeline.load(base / "pipe").load_adapter(path)
        else:
            return run(commands(path, base)[door])
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def measured(base: Path, door: str, make: Callable[[Path], Path]) -> tuple[int, str, float, float]:
    """Exit code (of a signal: negative), the last line, seconds, MiB above this process'."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "base"
        shutil.copytree(base, copy)
        path = make(copy)
        out = Path(folder) / "out.txt"
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(out, Path(folder), door, path, copy)
        _, status, usage = os.wait4(child, 0)
        seconds, above = (
            time.perf_counter() - start,
            usage.ru_maxrss / 1024 - float((out.parent / "before").read_text()),
        )
        lines = out.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        line = errors[0] if len(errors) == 1 and "Traceback" not in "\n".join(lines) else " | ".join(lines[-4:])
        return os.waitstatus_to_exitcode(status), line.replace(folder, ""), seconds, max(0.0, above)


def _child(out: Path, folder: Path, door: str, path: Path, base: Path) -> None:
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_AS, (GUARD, GUARD))
        signal.alarm(60)
        os.chdir(folder)
        Path("before").write_text(f"{_resident()}")
        file = os.open(out, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = act(door, path, base)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(words: list[str]) -> int:
    warnings.simplefilter("ignore")
    import ldm.checkpoints.adapters
    import ldm.checkpoints.merge
    import ldm.tasks.work.encode
    import ldm.tasks.work.evaluate
    import ldm.tasks.work.sample  # noqa: F401  (what all the children share)

    base = malformed.make_base(Path(tempfile.mkdtemp(prefix="ldm-malformed-")))
    rows, bad = [], 0
    for name, door, make in malformed.CASES:
        if not all(word in f"{name} {door}" for word in words):
            continue
        code, line, seconds, above = measured(base, door, make)
        good = code == 2 and line.startswith("error:") and seconds < SECONDS and above < MEBIBYTES
        bad += not good
        rows.append((name, door, code, line, f"{seconds:.2f}", f"{above:.0f}"))
        print(
            f"{'ok ' if good else 'BAD'} {seconds:5.1f} s {above:5.0f} MiB {code:3} {name} [{door}] {line[:300]}",
            flush=True,
        )
    shutil.rmtree(base)
    if not words:
        with (HERE / "malformed.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("case", "door", "exit code", "line", "seconds", "MiB above"))
            writer.writerows(rows)
    slowest, largest = (max(float(row[i]) for row in rows) for i in (4, 5))
    print(f"{len(rows)} cases, {bad} bad; at most {slowest} s and {largest:.0f} MiB")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
