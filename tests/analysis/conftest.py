"""Run directories below outputs/."""

from pathlib import Path
from typing import Any

import pytest
from written_runs import MakeRun, written_run

from ldm.analysis import Run


@pytest.fixture
def make(tmp_path: Path) -> MakeRun:
    """Writes outputs/NAME (tests/support/written_runs.py)."""

    def write(name: str = "a", changes: dict[str, Any] | None = None, step: int = 3) -> Run:
        return written_run(tmp_path / "outputs" / name, changes, step)

    return write
