"""Two threads at most: CI and a laptop have two cores, and results must not depend on more."""

import os
from pathlib import Path

import pytest
from tiny_run import make_tiny_run

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a real run of every stage (tiny_run.COMMAND), made once a session. Never write in it."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny_run"))
