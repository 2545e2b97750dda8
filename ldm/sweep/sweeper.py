"""Hydra's sweeper of every -m: composes the arms of a search's points, and hands them to hydra/launcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from ldm.build import build
from ldm.errors import ConfigError
from ldm.sweep.arms import TABLE, Arm, rows_of
from ldm.sweep.child import BASIC
from ldm.sweep.search import Grid, Row, Search
from ldm.sweep.space import Space, intervals


class Sweeps(BasicSweeper):
    """Hydra's own where all combinations are tried; else `conf/sweep` says which arms run.

    params: hydra.sweeper.params, a space that a YAML describes. max_batch_size: of Hydra's own.
    """

    __module__ = "hydra_plugins.ldm"  # where Hydra looks for sweepers; `ldm.run` registers it

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None):
        super().__init__(max_batch_size, params)
        self._launched = 0  # arms, those of earlier commands among them

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None
        self.search: Search = build(self.config.sweep, "sweep") or Grid()
        self.folder, self.metric = Path(self.config.hydra.sweep.dir), self.config.optimized_metric
        typed = [*self._parse_config(), *arguments]
        overrides = OverridesParser.create(self.hydra_context.config_loader).parse_overrides(typed)
        if self.search.n_jobs > 1 and self.config.hydra.launcher._target_ == BASIC:
            raise ConfigError(
                f"sweep.n_jobs={self.search.n_jobs}: hydra/launcher=basic runs one arm after another in this process; "
                "add hydra/launcher=processes."
            )
        endless = intervals(overrides)
        if self.search.finite and endless:
            raise ConfigError(
                f"{endless[0].input_line}: an interval has no end of values to try one by one. Add sweep=random or "
                f"sweep=optuna, or name values: {endless[0].get_key_element()}=A,B,C."
            )
        space = Space.of(overrides)
        self.search.check(self.metric)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / TABLE).open("a").close()
        except OSError as error:
            reason = f"{self.folder} cannot be written ({error.strerror})"
            raise ConfigError(f"{reason}: give another name= or outputs= folder.") from None
        self._launched = len(rows_of(self.folder)) if self.search.grows else 0
        if isinstance(self.search, Grid):
            return super().sweep(arguments)
        self.search.run(space, self)
        return None

    def run(self, arms: Sequence[list[str]]) -> list[Row]:
        """The rows of arms that are run to their ends."""
        assert self.config is not None and self.launcher is not None
        if not arms:
            return []
        self.validate_batch_is_legal(arms)
        returned = self.launcher.launch(arms, initial_job_idx=self._launched)
        self._launched += len(arms)
        for one in returned:
            _ = one.return_value  # raises what the launcher met
        rows = rows_of(self.folder)
        return [rows[str(self.arm(overrides).directory)] for overrides in arms]

    def arm(self, overrides: Sequence[str]) -> Arm:
        assert self.config is not None
        return Arm(
            self.folder, list(overrides), list(map(str, self.config.hydra.job.config.override_dirname.exclude_keys))
        )
