"""Fifty steps on two hosts of two processes, by torchrun and by srun's variables, and after one host was killed.

python experiments/008_processes/hosts.py [FOLDER]    as root: hosts are network namespaces (iproute2)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from run import (
    DDP,
    ENVIRONMENT,
    HERE,
    HOSTS,
    emptied,
    make_hosts,
    remove_hosts,
    scalars,
    torchrun,
    wait,
    when_training,
    workers,
    write,
)

TINY = ["model=unet_tiny", "text_encoder=small_tiny", "autoencoder=kl_tiny", "source=shapes", "max_steps=50"]
TINY += [
    "callbacks.losses.every_n_steps=1",
    "callbacks.validation.every_n_steps=25",
    "callbacks.samples.every_n_steps=50",
]
TINY += ["callbacks.jump_to_x0.every_n_steps=25", "callbacks.jump_to_x0.num_steps=5", "callbacks.samples.num_steps=5"]
TINY += ["callbacks.checkpoints.every_n_steps=10", "data.validation_samples=16", "name=run", "trainer.accelerator=cpu"]


def srun(folder: Path, arguments: list[str]) -> list[subprocess.Popen]:
    """What SLURM sets for each task of a step on two nodes."""
    started = []
    for rank in range(4):
        node = rank // 2
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % 2, "SLURM_NODEID": node, "SLURM_STEP_NUM_TASKS": 4}
        own |= {"SLURM_NTASKS": 4, "SLURM_JOB_ID": 4711, "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "10.77.0.[1-2]"}
        own |= {"GLOO_SOCKET_IFNAME": ("ldm-va", "ldm-vb")[node], "MASTER_ADDR": "10.77.0.1"}
        command = ["ip", "netns", "exec", HOSTS[node], sys.executable, "-m", "ldm.run", *arguments]
        log = (folder / f"host-{rank}.log").open("w")
        environment = {**ENVIRONMENT, **{k: str(v) for k, v in own.items()}}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    return started


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    sys.path.insert(0, str(HERE.parents[1] / "tests/support"))
    from tiny_training import make_data

    latents = make_data(root / "data")[2]
    base = [*TINY, f"shards={latents}"]
    table = []

    fresh = partial(emptied, root)

    def row(case: str, folder: Path, codes: str, started: float) -> None:
        run, found = folder / "outputs/run", {}
        if (run / "metrics.jsonl").is_file():
            ours, theirs = scalars(run), scalars(root / "one/outputs/run")
            losses = [k for k in theirs if k[1].startswith(("train/loss", "val/loss"))]
            assert ours.keys() == theirs.keys()
            found["losses differ by, relative"] = max(abs(ours[k] - theirs[k]) / abs(theirs[k]) for k in losses)
            found["W&B runs"] = len(list((run / "wandb").glob("offline-run-*")))
            found["W&B pictures"] = len(list((run / "wandb").rglob("*jump_to_x0*.png")))
            found["pictures"] = len(list((run / "images").glob("*jump_to_x0*.png")))
        table.append({"case": case, "exit": codes, **found, "seconds": round(time.time() - started)})
        print(table[-1], flush=True)

    one, started = fresh("one"), time.time()
    command = [sys.executable, "-m", "ldm.run", *base, "batch_size=2", "accumulate=4"]
    code = subprocess.run(command, cwd=one, env=ENVIRONMENT, check=False, capture_output=True).returncode
    row("one process accumulating 4", one, str(code), started)
    make_hosts()
    many = [*base, *DDP, "batch_size=2"]
    folder, started = fresh("torchrun"), time.time()
    row("2 hosts x 2, torchrun", folder, wait(torchrun(folder, many, [2, 2])), started)
    folder, started = fresh("srun"), time.time()
    row("2 hosts x 2, srun's variables", folder, wait(srun(folder, many)), started)
    folder, started = fresh("killed"), time.time()
    jobs = torchrun(folder, many, [2, 2])
    when_training(folder, 25)
    os.killpg(jobs[1].pid, signal.SIGKILL)  # the agent; its workers are in sessions of their own
    for pid in workers(folder)[2:]:
        os.kill(pid, signal.SIGKILL)
    first = wait(jobs)
    row("the same, one host killed, and again", folder, f"{first}, {wait(torchrun(folder, many, [2, 2]))}", started)
    remove_hosts()
    write(table, HERE / "hosts.csv")


if __name__ == "__main__":
    main()
