"""hydra/launcher=processes: arms side by side on one host, each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

from ldm.errors import ConfigError, Ended
from ldm.launch import launch
from ldm.sweep.arms import Arm, ready, run_arm
from ldm.sweep.child import Child

LINGER = 0.05  # seconds between two looks at the processes


class Processes(Launcher):
    """hydra/launcher=processes: up to `n_jobs` arms side by side on this host, each in a process.

    devices: of the GPUs, those that arms take in turn, one each; none: every arm sees all.
    """

    __module__ = "hydra_plugins.ldm"  # where Hydra looks for launchers; `ldm.run` registers it

    def __init__(self, n_jobs: int = 1, devices: Sequence[int] | None = None):
        self.n_jobs, self.devices = n_jobs, list(devices or ())
        if n_jobs < 1:
            raise ConfigError(f"sweep.n_jobs={n_jobs}: at least 1.")

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self._loader, self._config = hydra_context.config_loader, config
        if launch().world_size > 1:
            raise ConfigError(
                f"hydra/launcher=processes starts the processes itself, and {launch().by} has started some: leave one "
                "of the two out."
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        returned = [JobReturn(overrides=o, status=JobStatus.COMPLETED) for o in job_overrides]
        waiting, running = list(enumerate(job_overrides)), dict[int, tuple[int, Child]]()  # slot -> arm
        try:
            while waiting or running:
                for slot in [s for s in range(self.n_jobs) if s not in running][: len(waiting)]:
                    index, overrides = waiting.pop(0)
                    child = self._start(initial_job_idx + index, overrides, slot)
                    if child is None:
                        returned[index].return_value = None
                    else:
                        running[slot] = index, child
                for slot, (index, child) in list(running.items()):
                    if child.process.poll() is not None:
                        del running[slot]
                        returned[index].return_value = _settled(child)
                time.sleep(LINGER)
        except BaseException as stop:
            for _, child in running.values():
                child.send(stop)
            for _, child in running.values():
                child.wait_or_kill()
                with suppress(Ended):
                    _settled(child)
            raise
        return returned

    def _start(self, number: int, overrides: Sequence[str], slot: int) -> Child | None:
        """The arm's process; None where it is refused without one."""
        composed = self._loader.load_sweep_config(self._config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        HydraConfig.instance().set_config(composed)
        arm = Arm.current()
        assert arm is not None
        with open_dict(composed):
            del composed["hydra"]
        try:
            ready(composed, arm)
        except Exception as error:
            refusal = error  # bound here: `error` is gone after this block
            run_arm(arm, lambda: _raised(refusal), composed)
            return None
        return Child(arm, composed, self._environment(slot))

    def _environment(self, slot: int) -> dict[str, str]:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.n_jobs))}
        found = {} if "OMP_NUM_THREADS" in os.environ else share
        if self.devices:
            device = self.devices[slot % len(self.devices)]
            visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
            found["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
        return found


def _settled(child: Child) -> float | None:
    """The row of an arm that has ended, and its value."""
    value = run_arm(child.arm, child.numbers, child.config)
    if child.process.returncode == 0:
        print(f"finished: {' '.join(child.arm.changes)}", flush=True)
    return value


def _raised(error: Exception) -> dict[str, float]:
    raise error
