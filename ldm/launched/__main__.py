"""A process that `launcher` or a sweep starts: python -m ldm.launched JOB, where the configuration is."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from ldm.atomic import atomic_write
from ldm.launch import HANDED, PARENT


def main() -> None:
    """Does what the job says, and leaves how it ended where whoever started it looks: code, line, numbers."""
    _end_with_parent()
    from omegaconf import OmegaConf

    from ldm.config.schema import look_in, task_class
    from ldm.run import Ending, guarded
    from ldm.sweep.arms import Arm

    job = json.loads(Path(sys.argv[1]).read_text())
    look_in(*map(Path, job["folders"]))
    Arm.handed = Arm(**{**job["arm"], "sweep": Path(job["arm"]["sweep"])}) if job["arm"] else None
    config = OmegaConf.create(job["config"])
    target = config.task._target_
    metrics: dict[str, float] = {}
    try:
        ending = guarded(lambda: metrics.update(task_class(target, target).run(config)))
    except BaseException as error:
        traceback.print_exc()
        ending = Ending(1, f"{type(error).__name__}: {error}", final=False)
    with atomic_write(Path(os.environ[HANDED])) as part:
        part.write_text(json.dumps({**asdict(ending), "metrics": metrics}))
    sys.stdout.flush()
    sys.exit(ending.code)


def _end_with_parent() -> None:
    """Whoever kills the launcher kills its processes: they get SIGTERM then, and save (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[PARENT]):  # it died before
        sys.exit(75)


if __name__ == "__main__":
    main()
