"""Our sweeper and launcher where Hydra looks for such: it takes none that is not in the package hydra_plugins."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

HOME = "hydra_plugins"  # a namespace that installed plugins share; none where there are none
SIDE_BY_SIDE = {"joblib": "n_jobs", "submitit_slurm": "array_parallelism"}  # what their launchers call sweep.n_jobs


def register() -> None:
    """Before Hydra composes a sweep."""
    found = Plugins.instance()  # the first time it loads Hydra's own anew, and ours must inherit from those
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from ldm.sweep import processes, sweeper

    if not issubclass(sweeper.Sweeps, BasicSweeper):  # who imported it before that has the old one
        importlib.reload(sweeper)
    try:
        home: Any = importlib.import_module(HOME)
    except ImportError:
        home = sys.modules[HOME] = ModuleType(HOME)
        home.__path__ = []
    ours: Any = ModuleType(f"{HOME}.ldm")
    for plugin in (sweeper.Sweeps, processes.Processes):
        setattr(ours, plugin.__name__, plugin)
        found.register(plugin)
    home.ldm = sys.modules[ours.__name__] = ours
    known: Any = ConfigStore.instance().repo["hydra"]["launcher"]
    for launcher, key in SIDE_BY_SIDE.items():
        if f"{launcher}.yaml" in known:
            known[f"{launcher}.yaml"].node[key] = "${sweep.n_jobs}"
