"""Runs as pandas frames and matplotlib figures, on disk or from W&B: the notebooks' only import of ldm.

from ldm.analysis import Run, compare, newest, plot_loss, runs

runs("outputs/*")                          # a table, one row a run; also runs("wandb://entity/project")
run = Run("outputs/mine")
run.metrics.plot(x="step", y="val/loss")
run.picture("jump_to_x0")
plot_loss([run, Run("outputs/other")], smooth=5)
diff(run, "outputs/other")                 # configuration and results
"""

from ldm.analysis.figures import plot_loss, plot_loss_by_t, plot_throughput, plot_x0_error, throughput
from ldm.analysis.objective_figure import plot_objective
from ldm.analysis.replicates import read_results, settings
from ldm.analysis.run import Run
from ldm.analysis.scores import scores
from ldm.analysis.sweeps import importance, plot_differences, plot_importance, plot_sweep_parallel
from ldm.analysis.tables import compare, diff, newest, runs
from ldm.analysis.trajectories import film_strip, plot_trajectories, trajectories
from ldm.analysis.wandb_runs import WandbRun

__all__ = [
    "Run",
    "WandbRun",
    "compare",
    "diff",
    "film_strip",
    "importance",
    "newest",
    "plot_differences",
    "plot_importance",
    "plot_loss",
    "plot_loss_by_t",
    "plot_objective",
    "plot_sweep_parallel",
    "plot_throughput",
    "plot_trajectories",
    "plot_x0_error",
    "read_results",
    "runs",
    "scores",
    "settings",
    "throughput",
    "trajectories",
]
