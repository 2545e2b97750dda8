"""One thread a worker: CI and a laptop have two cores, and results must not depend on more."""

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from loader_data import dataset
from tiny_run import make_tiny_run

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # without workers (-n 0) torch is there already; forked ranks hang beside its threads
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a real run of every stage (tiny_run.COMMAND), made once for all workers. Never write in it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_run"
    with FileLock(f"{shared}.lock"):
        return make_tiny_run(shared)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours to go on from, tiny, made in this process (tests/support/few.py). Never write in it."""
    from few import make_base  # what it imports takes seconds

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def fifty(tmp_path_factory) -> Path:
    return dataset(tmp_path_factory.mktemp("data") / "fifty", 50)


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    """A small Stable Diffusion 1 as on the hub (tests/support/published.py). Never write in it."""
    return _published(tmp_path_factory, "sd1")


@pytest.fixture(scope="session")
def sd1_inpaint_folder(tmp_path_factory) -> Path:
    return _published(tmp_path_factory, "sd1_inpaint")


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory) -> Path:
    """Stable Diffusion 2 with v-prediction."""
    return _published(tmp_path_factory, "sd2")


@pytest.fixture
def small_is_published(monkeypatch):
    """As if tests/support/published.py's sizes were Stable Diffusion's own, so that shapes alone are enough."""
    from ldm.formats import published  # what it imports takes seconds

    widths = (32, 64, 64, 64)
    monkeypatch.setitem(published.UNETS, (widths, 32), {"head_dim": 8, "num_heads": None, "norm_groups": 8})
    monkeypatch.setitem(published.AUTOENCODERS, ((16, 16, 32, 32), 4), {"norm_groups": 8})
    monkeypatch.setattr(published, "AUTOENCODER", (16, 16, 32, 32))
    rest = {"heads": 4, "activation": "gelu", "pad": "!"}
    monkeypatch.setitem(published.TEXTS, (32, True), rest)
    monkeypatch.setitem(published.TEXTS, (32, False), rest | {"activation": "quick_gelu", "pad": None})


def _published(factory, name: str) -> Path:
    import published as published_models  # diffusers takes seconds to import

    return published_models.save(getattr(published_models, name)(), factory.mktemp("published") / name)
