"""One real run of every stage, made once a session: what tests of run directories look at."""

import os
import subprocess
import sys
from pathlib import Path

COMMAND = ("-m", "ldm.run", "experiment=quickstart", "debug=fast_dev_run")


def make_tiny_run(folder: Path) -> Path:
    """The run directory, folder/outputs/quickstart-DIGEST-seed0, of the command typed in `folder` (about 20 s).

    A folder that has one already is not run in again.
    """
    done_before = sorted((folder / "outputs").glob("quickstart-*/report.html"))
    if done_before:
        return done_before[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *COMMAND], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(COMMAND)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    (run,) = (folder / "outputs").glob("quickstart-*")
    return run
