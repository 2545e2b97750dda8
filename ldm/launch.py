"""Who this process is among those that were started together: from the environment alone, before torch is there."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

BEGAN = "LDM_STARTED"  # to each process that our launcher starts: when the command itself did
STARTED = float(os.environ.get(BEGAN) or time.monotonic())  # of the command, by the clock of its host
# To each process that our launcher starts: the file for how it ended, and the process that started it.
HANDED, PARENT = "LDM_PROCESS_RESULT", "LDM_PROCESS_PARENT"


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int = 0
    by: str = ""  # torchrun, srun or launcher, our own; "": one process

    @property
    def first(self) -> bool:
        return self.rank == 0


def launch() -> Launch:
    """Read from what torchrun (or whoever sets its variables) or srun say; one process where neither does."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        local, node = int(env.get("LOCAL_RANK", 0)), int(env.get("GROUP_RANK", 0))
        by = "launcher" if HANDED in env else "torchrun"
        return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), local, node, by)
    # Only srun says how many tasks a step has. A batch script, a shell or a notebook in a job is one process, whatever
    # SLURM_NTASKS promises.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or 1)
    if "SLURM_PROCID" in env and tasks > 1:
        local, node = int(env.get("SLURM_LOCALID", 0)), int(env.get("SLURM_NODEID", 0))
        return Launch(int(env["SLURM_PROCID"]), tasks, local, node, "srun")
    return Launch()


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return launch().first


def expect_srun() -> None:
    """trainer=ddp or fsdp in a SLURM job: its tasks are processes, also where SLURM does not say which step this is."""
    env = os.environ
    known = "RANK" in env or "SLURM_STEP_NUM_TASKS" in env or env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if known or "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS") or 1) < 2:
        return
    env["SLURM_STEP_NUM_TASKS"] = env["SLURM_NTASKS"]
    if env["SLURM_PROCID"] == "0":
        print(
            f"SLURM_NTASKS={env['SLURM_NTASKS']}: waiting for the other tasks. In an sbatch script the command begins "
            "with srun; without trainer=ddp it is one process.",
            file=sys.stderr,
        )


class OtherProcess(Exception):
    """Another process of this job ended it; its log has the reason, this one has its line."""

    def __init__(self, line: str, exit_code: int, told_here: bool, ends_sweep: bool = False):
        super().__init__(line)
        self.exit_code, self.told_here = exit_code, told_here  # told_here: it stands in this host's log already
        self.ends_sweep = ends_sweep  # every other arm would end so too
