"""Figures of runs. Each returns a matplotlib Figure of its own: no pyplot, no state, `figure.savefig(path)` works."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from ldm.analysis.logged import Logged, is_number
from ldm.analysis.sources import Source, as_run
from ldm.errors import ConfigError

CURVES = 6  # steps shown in one picture
SEEN_ON_BOTH = ListedColormap(colormaps["viridis"](np.linspace(0.25, 0.85, 256)))  # on white and on black
EVENTS = {"resume": "--", "stop": ":"}  # those that are marked, and how


def plot_loss(runs: Source | Sequence[Source], smooth: int = 0) -> Figure:
    """Training loss (line) and validation loss (dots, one standard error) against the images seen.

    smooth: logged points on either side that the line over the training loss is fitted to; 0 draws it as logged.

    >>> plot_loss([Run("outputs/eps"), Run("outputs/v")], smooth=10)
    """
    figure, (axes,) = _figure(1)
    for i, run in enumerate(_as_runs(runs)):
        _plot_one_loss(axes, run, f"C{i}", smooth)
    if not axes.lines:
        raise ConfigError("none of these runs has logged a loss yet: see Run(path).metrics.")
    axes.set(xlabel="images seen", ylabel="loss")
    axes.legend()
    return figure


def plot_loss_by_t(run: Source) -> Figure:
    """The loss against time, one curve a step, dark early and bright late: training left, validation right.

    Training times are drawn at random, so a training curve is the mean over the steps since the curve before it.

    >>> plot_loss_by_t(Run("outputs/mine")).savefig("loss_by_t.png")
    """
    (run,) = _as_runs(run)
    frame = run.loss_by_t()
    splits = [s for s in ("train", "val") if s in set(frame["split"])]
    if not splits:
        raise ConfigError(f"{run.path} has no loss by time: only runs with module=latent_diffusion log it.")
    figure, every = _figure(len(splits))
    tables = [frame[frame["split"] == s].pivot(index="step", columns="t", values="loss") for s in splits]
    colour = _colour_of_steps(frame)
    for axes, split, table in zip(every, splits, tables, strict=True):
        _curves(axes, _windows(table) if split == "train" else _chosen(table), colour)
        axes.set(title={"train": "training", "val": "validation"}[split], xlabel="t  (0 data, 1 noise)", ylabel="loss")
        axes.set_xlim(0, 1)
    figure.colorbar(colour, ax=every, label="step")
    return figure


def plot_x0_error(run: Source) -> Figure:
    """The squared error of the jump to x0 against sigma/alpha, one curve a step, dark early and bright late.

    Dashed: the best guess for latents that are plain Gaussian noise of variance 1, r^2/(1 + r^2) at r = sigma/alpha.
    What a model does better than that it knows about pictures.

    >>> plot_x0_error(Run("outputs/mine"))
    """
    (run,) = _as_runs(run)
    frame = run.x0_error()
    if frame.empty:
        raise ConfigError(f"{run.path} has no x0 error: only the validation of module=latent_diffusion measures it.")
    figure, (axes,) = _figure(1)
    colour = _colour_of_steps(frame)
    _curves(axes, _chosen(frame.pivot(index="step", columns="sigma", values="x0_error")), colour)
    r = np.geomspace(frame["sigma"].min(), frame["sigma"].max(), 100)
    axes.plot(r, r**2 / (1 + r**2), "--", color="grey", label="Gaussian guess")
    axes.set(xscale="log", yscale="log", xlabel="sigma / alpha", ylabel="squared error of the jump to x0")
    axes.legend()
    figure.colorbar(colour, ax=axes, label="step")
    return figure


def plot_throughput(runs: Source | Sequence[Source]) -> Figure:
    """Images a second against the time since a run began, with its restarts (dashed) and stops (dotted).

    Dots are the rates that were logged; the line is what was achieved between records of the training loss, with
    validation, pictures and checkpoints within: where it lies below the dots, they are what time went into.

    >>> plot_throughput("outputs/mine")
    """
    every = [(run, throughput(run)) for run in _as_runs(runs)]
    if all(rate.empty for _, rate in every):
        raise ConfigError("none of these runs has logged its speed yet: see Run(path).metrics.")
    figure, (axes,) = _figure(1)
    unit, size = ("hours", 1) if max(rate["hours"].max() for _, rate in every) > 2 else ("minutes", 60)
    for i, (run, rate) in enumerate(every):
        when = rate["hours"] * size
        axes.plot(when, rate["achieved"], color=f"C{i}", alpha=0.6, drawstyle="steps", label=plain(run.name))
        axes.plot(when, rate["logged"], "o", color=f"C{i}", markersize=4, label="_logged")
        for time, event in events_of(run):
            if event in EVENTS:
                hours = (time - rate.attrs["began"]) / 3600
                axes.axvline(hours * size, color=f"C{i}", linestyle=EVENTS[event], linewidth=1, label=f"_{event}")
    axes.set(xlabel=f"{unit} since the start", ylabel="images a second", ylim=(0, None))
    axes.legend()
    return figure


def throughput(run: Source) -> pd.DataFrame:
    """Speed by time: step, hours since the start, logged (images a second of training alone), achieved (all in all).

    achieved is the images between a record and the one before, by the time between them; nan over a restart.
    """
    (run,) = _as_runs(run)
    rows = run.metrics.reindex(columns=["step", "images", "time", "train/loss", "train/images_per_second"])
    rows = rows.astype(float).dropna(subset=["train/loss", "train/images_per_second"], how="all")
    seconds, events = rows["time"].diff(), events_of(run)
    achieved = (rows["images"].diff() / seconds).where(seconds > 0)
    for time, event in events:
        if event == "resume":
            achieved[(rows["time"] >= time) & (rows["time"].shift() < time)] = np.nan
    began = min([time for time, _ in events[:1]] + rows["time"].head(1).tolist(), default=0.0)
    rows = rows.assign(hours=(rows["time"] - began) / 3600, logged=rows["train/images_per_second"], achieved=achieved)
    table = rows[["step", "hours", "logged", "achieved"]].astype({"step": int}).reset_index(drop=True)
    table.attrs["began"] = began
    return table


def events_of(run: Logged) -> list[tuple[float, str]]:
    """(time, event) in order; what is no event is passed over."""
    every = run.events.to_dict("records")
    return [(e["time"], e["event"]) for e in every if is_number(e.get("time")) and isinstance(e.get("event"), str)]


def _as_runs(runs: Source | Sequence[Source]) -> list[Logged]:
    several = runs if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    return [as_run(run) for run in several]


def plain(name: str) -> str:
    """A run's name for a label, where $ would begin a formula."""
    return name.replace("$", r"\$")


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1.5 + 5 * panels, 3.8), dpi=100, layout="constrained")
    every = figure.subplots(1, panels, sharey=True, squeeze=False)[0].tolist()
    for axes in every:
        axes.grid(alpha=0.3)
    return figure, every


def _plot_one_loss(axes: Axes, run: Logged, colour: str, smooth: int) -> None:
    metrics = run.metrics
    if "train/loss" in metrics:
        train = metrics.dropna(subset=["train/loss"])
        loss = train["train/loss"].to_numpy()
        if smooth > 0:
            axes.plot(train["images"], loss, color=colour, alpha=0.25)
            loss = _smoothed(loss, smooth)
        alone = "." if len(loss) == 1 else None
        axes.plot(train["images"], loss, marker=alone, color=colour, label=f"{plain(run.name)}, training")
    if "val/loss" in metrics:
        val = metrics.dropna(subset=["val/loss"])
        error = val.get("val/loss_standard_error")
        label = f"{plain(run.name)}, validation"
        axes.errorbar(val["images"], val["val/loss"], error, color=colour, fmt="o--", ms=4, capsize=2, label=label)


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """At each point the parabola through its surroundings (Savitzky and Golay 1964): a mean would lie above a bend.

    `width` points on either side, fewer but equally many near the ends.
    """
    smooth, last = np.empty(len(values)), len(values) - 1
    for i in range(len(values)):
        reach = min(width, i, last - i)
        weights = 3 * (3 * reach**2 + 3 * reach - 1) - 15 * np.arange(-reach, reach + 1) ** 2
        smooth[i] = values[i - reach : i + reach + 1] @ weights / weights.sum()
    return smooth


def _chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Up to CURVES rows of a table of steps, the first and the last among them."""
    rows = np.unique(np.linspace(0, len(table) - 1, CURVES).round().astype(int))
    return table.iloc[rows]


def _windows(table: pd.DataFrame) -> pd.DataFrame:
    """Means over up to CURVES equal windows of rows, each named by its last step."""
    parts = [table.iloc[rows] for rows in np.array_split(np.arange(len(table)), min(CURVES, len(table)))]
    return pd.DataFrame([part.mean() for part in parts], index=[part.index[-1] for part in parts])


def _colour_of_steps(frame: pd.DataFrame) -> ScalarMappable:
    return ScalarMappable(Normalize(frame["step"].min(), frame["step"].max()), SEEN_ON_BOTH)


def _curves(axes: Axes, table: pd.DataFrame, colour: ScalarMappable) -> None:
    for step, row in zip(table.index.tolist(), table.itertuples(index=False), strict=True):
        values = pd.Series(row, index=table.columns).dropna()
        axes.plot(values.index, values, marker="o", markersize=3, color=colour.to_rgba(step), label=f"_step {step}")
