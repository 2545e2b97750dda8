"""A task in place of training, for sweeps: `task._target_=stub_task.Stub`, what it does is chosen by seed=."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import ConfigError
from ldm.sweep.arms import Arm
from ldm.tasks.train import Train
from ldm.training.callbacks.saving import Interrupted
from ldm.training.module import Diverged

CALLS: list[tuple[int, Path]] = []  # (seed, directory) of every arm that has run in this process


@dataclass
class Stub(Train):
    @staticmethod
    def run(config):
        arm = Arm.current()
        assert arm is not None
        arm.directory.mkdir(parents=True, exist_ok=True)
        CALLS.append((config.seed, arm.directory))
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
        return {"val/loss": 1.0 / (1 + config.seed), "val/psnr": float(config.seed)}
