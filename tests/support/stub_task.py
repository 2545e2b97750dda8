"""A task in place of training, for sweeps: `task._target_=stub_task.Stub`, seed= and max_steps= say what it does."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.sweep.arms import Arm
from ldm.tasks.train import Train
from ldm.training.callbacks.saving import Interrupted
from ldm.training.module import Diverged

CALLS: list[tuple[int, Path]] = []  # (seed, directory) of every arm that has run in this process
STEPS: list[int] = []  # and its max_steps
LOGGERS: list[Any] = []  # and its logger


@dataclass
class Stub(Train):
    @staticmethod
    def run(config):
        arm = Arm.current()
        assert arm is not None
        arm.directory.mkdir(parents=True, exist_ok=True)
        CALLS.append((config.seed, arm.directory))
        STEPS.append(config.max_steps)
        LOGGERS.append(config.logger)
        match config.seed:
            case 90:
                raise Diverged("the training loss is nan at step 2")
            case 91:
                raise ConfigError("this cannot be: type something else")
            case 92:
                raise RuntimeError("out of memory,\nand more lines")
            case 93:
                raise Interrupted(signal.SIGINT, 7, Path("checkpoints"))
            case 94:
                raise KeyboardInterrupt
            case 95:
                os.kill(os.getpid(), signal.SIGTERM)
            case 96:
                return {"val/loss": None}  # as last_metrics gives what was not finite
            case 97:
                os.kill(os.getpid(), signal.SIGKILL)
        if config.max_steps == 7:
            raise ConfigError("7 steps cannot be: type another number")
        if config.max_steps == 8 and os.environ.get("STUB_FAILS"):
            raise RuntimeError("8 steps failed")
        loss = 1.0 / (1 + config.seed) + (config.max_steps < 100) * (config.max_steps - 3) ** 2
        return {"val/loss": loss, "val/psnr": float(config.seed)}
