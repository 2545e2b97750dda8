"""Runs on disk as pandas frames and matplotlib figures: the notebooks' only import of ldm.

from ldm.analysis import Run, compare, newest, plot_loss, runs

runs("outputs/*")                          # a table, one row a run
run = Run("outputs/mine")
run.metrics.plot(x="step", y="val/loss")
run.picture("jump_to_x0")
plot_loss([run, Run("outputs/other")], smooth=5)
"""

from ldm.analysis.figures import plot_loss, plot_loss_by_t, plot_x0_error
from ldm.analysis.replicates import read_results, settings
from ldm.analysis.run import Run
from ldm.analysis.tables import compare, newest, runs

__all__ = [
    "Run",
    "compare",
    "newest",
    "plot_loss",
    "plot_loss_by_t",
    "plot_x0_error",
    "read_results",
    "runs",
    "settings",
]
