"""Ctrl-C at ten random moments of one LoRA run: each leaves a file that loads and a run that goes on.

    python experiments/006_adapters/stops.py [SEED]      # on a small random SD 1 pipeline made here; about 8 minutes

The run is interrupted, started again, interrupted ... and at last ends. Its LoRA must then be that of the same run left
alone, bit for bit. Writes stops.csv: when the signal came, where the run stood, exit code, whether the file loads.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ldm import Pipeline

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import published  # noqa: E402

STEPS = 150


def command(work: Path, name: str) -> list[str]:
    asked = ["experiment=finetune", "adapter=[lora]", "adapter.lora.dropout=0.1", f"checkpoint={work / 'base'}"]
    asked += [f"images={work / 'pictures'}", "instance_prompt=a photo of sks cat", f"name={name}", "image_size=64"]
    asked += [f"max_steps={STEPS}", "batch_size=2", "trainer=debug", "trainer.limit_val_batches=1", "logger=none"]
    asked += ["callbacks.samples.every_n_steps=40", "callbacks.samples.num_steps=2", "callbacks.samples.num_prompts=1"]
    asked += ["callbacks.jump_to_x0.every_n_steps=60", "callbacks.jump_to_x0.num_steps=2"]
    asked += ["callbacks.checkpoints.every_n_steps=50", "callbacks.validation.every_n_steps=50"]
    return [sys.executable, "-m", "ldm.run", *asked]


def start(work: Path, name: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(work, name), cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def prepare(work: Path) -> None:
    published.save(published.sd1(), work / "base")
    (work / "pictures").mkdir()
    for i in range(5):
        picture = Image.new("RGB", (80, 70 + i), (40 * i, 90, 200 - 30 * i))
        ImageDraw.Draw(picture).ellipse((10, 10, 50, 50 + i), fill=(250, 200, 20 * i))
        picture.save(work / "pictures" / f"{i}.png")


def interrupted(work: Path, after: float) -> tuple[int, str]:
    """(exit code, last line) of a run that gets SIGINT `after` seconds into its training."""
    process = start(work, "stopped")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("--- diffusion"):
            break
    time.sleep(4.0 + after)  # modules are built and the first step runs within 4 s
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read().strip().splitlines()
    return process.wait(), rest[-1] if rest else ""


def main(seed: int = 0) -> None:
    random.seed(seed)
    work = Path(tempfile.mkdtemp(prefix="stops"))
    prepare(work)
    whole = start(work, "whole")
    whole.communicate()
    assert whole.returncode == 0
    rows = []
    for i in range(10):
        after = random.uniform(0.0, 5.0)
        code, line = interrupted(work, after)
        run = work / "outputs/stopped"
        files = sorted((run / "export").rglob("*.safetensors")) if (run / "export").is_dir() else []
        loads = False
        if files:
            pipe = Pipeline.load(work / "base")
            pipe.load_adapter(files[-1])
            picture = pipe.sample("a photo of sks cat", num_steps=2, height=64, width=64)
            loads = bool(picture.isfinite().all())
        step = files[-1].parent.name if files else ""
        row = {"stop": i, "seconds": f"{after:.2f}", "exit_code": code, "export": step, "loads": loads, "line": line}
        rows.append(row)
        print(row, flush=True)
        if code == 0:
            break
    start(work, "stopped").communicate()
    (ours,), (theirs,) = (
        sorted((work / "outputs" / n / "export").rglob("*.safetensors")) for n in ("stopped", "whole")
    )
    one, other = load_file(ours), load_file(theirs)
    same = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    rows.append(
        {"stop": "end", "exit_code": 0, "export": ours.parent.name, "loads": same, "line": "bit for bit as the whole"}
    )
    print(rows[-1])
    with (HERE / "stops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
