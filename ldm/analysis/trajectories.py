"""How samples come about: film strips of jumps to x0, and the paths of samples between noise and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ldm.analysis.logged import Logged
from ldm.analysis.sources import as_run
from ldm.diffusion.samplers.solver import Step
from ldm.errors import ConfigError
from ldm.pictures import to_bytes

COLUMNS = 12  # of a film strip
DPI = 100
DRAWN = 64  # paths of one name that are drawn; the table has all


def film_strip(
    run: Logged | str | Iterable[Step],
    decode: Callable[[Tensor], Tensor] | None = None,  # (B,C,h,w) latents -> (B,3,H,W) in [-1, 1]
    step: int | None = None,
) -> Figure:
    """The current latent x_t above the jump to x0 from it, a column a step of sampling, with sigma/alpha.

    A run shows the strip that it has stored (the newest, or that of a training step). Steps, as `Pipeline.steps` gives
    them, are decoded here: up to 12 of them, the first and the last among these, and a pair of rows for each picture.

    >>> film_strip("outputs/mine")
    >>> film_strip(pipe.steps("a red circle", num_steps=20), pipe.decode)
    """
    if isinstance(run, str | Logged) or hasattr(run, "__fspath__"):
        return _stored(as_run(run), step)  # type: ignore[arg-type]
    steps = list(run)
    if not steps:
        raise ConfigError("film_strip: there is no step to show; pipe.steps(prompt) gives some.")
    if decode is None:
        raise ConfigError("film_strip of steps shows decoded latents: give film_strip(steps, pipe.decode).")
    numbers = np.unique(np.linspace(0, len(steps) - 1, COLUMNS).round().astype(int)).tolist()
    with torch.no_grad():
        columns = [torch.stack([decode(steps[i].x_t), decode(steps[i].x0)], 1) for i in numbers]
    count = len(columns[0])
    figure = Figure(figsize=(1.1 * len(columns) + 0.5, 2.3 * count + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(2 * count, len(columns), squeeze=False)
    for i, (number, pictures) in enumerate(zip(numbers, columns, strict=True)):
        shown = to_bytes(pictures.flatten(0, 1))
        for panel, picture in zip(panels[:, i], shown, strict=True):
            panel.imshow(picture, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        sigma = float(steps[number].level.ratio)
        panels[0, i].set_title(f"step {number + 1}\n$\\sigma/\\alpha$ {sigma:.3g}", fontsize="small")
    for row, panel in enumerate(panels[:, 0]):
        panel.set_ylabel(("$x_t$", "jump to $x_0$")[row % 2], fontsize="small")
    return figure


def _stored(run: Logged, step: int | None) -> Figure:
    picture = run.picture("jump_to_x0", step)
    with picture:
        pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)  # pixel for pixel
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    return figure


def trajectories(paths: Mapping[str, Any]) -> pd.DataFrame:
    """Length and straightness of paths: name, path, length, distance, straightness.

    paths: names to (N, steps, 2), (N, steps, C, h, w) or any (N, steps, ...), arrays or tensors; N paths of each.
    length: sum of the Euclidean lengths of the steps, in all dimensions. distance: from the first point to the last.
    straightness: distance/length, 1 on a line (nan where nothing moves).

    >>> trajectories({"euler": torch.stack([s.x_t for s in pipe.steps("a red circle")], 1)})
    """
    rows = []
    for name, points in _flat(paths).items():
        length = np.linalg.norm(np.diff(points, axis=1), axis=2).sum(1)
        distance = np.linalg.norm(points[:, -1] - points[:, 0], axis=1)
        ratio = np.divide(distance, length, out=np.full_like(length, np.nan), where=length > 0)
        rows += list(zip([name] * len(length), range(len(length)), length, distance, ratio, strict=True))
    return pd.DataFrame(rows, columns=["name", "path", "length", "distance", "straightness"])


def plot_trajectories(paths: Mapping[str, Any], data: Any = None) -> Figure:
    """Paths of samples in the plane, a colour a name, from the hollow dot to the full one.

    paths: as for `trajectories`. What has more than two dimensions is projected onto the two directions along which
    all points of all paths, and the data, vary most: the same plane for all. data: (M, ...) points to draw beneath.

    >>> plot_trajectories({"euler": euler, "heun": heun}, data=x0)
    """
    flat = _flat(paths)
    below = None if data is None else _array(data).reshape(len(data), -1)
    every = [points.reshape(-1, points.shape[2]) for points in flat.values()]
    if below is not None and below.shape[1] != every[0].shape[1]:
        raise ConfigError(f"plot_trajectories: paths have {every[0].shape[1]} dimensions and data {below.shape[1]}.")
    project, share = _plane(np.concatenate(every + ([] if below is None else [below])))
    figure = Figure(figsize=(5.5, 5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    if below is not None:
        x, y = project(below).T
        axes.plot(x, y, ".", color="grey", alpha=0.4, markersize=3, label="data")
    straight = trajectories(paths).groupby("name")["straightness"].mean()
    for i, (name, points) in enumerate(flat.items()):
        plane, colour = project(points[:DRAWN]), f"C{i}"
        for j, path in enumerate(plane):
            label = f"{name}, straightness {straight[name]:.3f}" if j == 0 else None
            axes.plot(*path.T, color=colour, linewidth=1, alpha=0.7, label=label)
        axes.plot(*plane[:, 0].T, "o", color=colour, markerfacecolor="none", markersize=4)
        axes.plot(*plane[:, -1].T, "o", color=colour, markersize=4)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    if share is not None:
        axes.set(xlabel=f"first direction, {share[0]:.0%} of the variance", ylabel=f"second, {share[1]:.0%}")
    return figure


def _plane(points: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], Sequence[float] | None]:
    """A projection of (..., D) onto (..., 2), and the shares of variance it keeps: None where D is 2 already."""
    if points.shape[1] == 2:
        return (lambda p: p), None
    middle = points.mean(0)
    _, size, directions = np.linalg.svd(points - middle, full_matrices=False)
    shares = size**2 / max((size**2).sum(), 1e-300)
    return (lambda p: (p - middle) @ directions[:2].T), shares[:2].tolist()


def _flat(paths: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """(N, steps, D) of each name."""
    if not isinstance(paths, Mapping) or not paths:
        raise ConfigError('paths are {name: (N, steps, ...)}, for example {"euler": points}.')
    found = {str(name): _array(points) for name, points in paths.items()}
    for name, points in found.items():
        if points.ndim < 3 or points.shape[1] < 2 or not points.size or not np.isfinite(points).all():
            raise ConfigError(
                f"paths[{name!r}] is {tuple(points.shape)}{'' if np.isfinite(points).all() else ' with NaN'}: give "
                "(N, steps, ...) with two steps or more, finite."
            )
    flat = {name: points.reshape(*points.shape[:2], -1) for name, points in found.items()}
    if len({points.shape[2] for points in flat.values()}) > 1:
        sizes = ", ".join(f"{name} {points.shape[2]}" for name, points in flat.items())
        raise ConfigError(f"paths are of different dimensions ({sizes}): compare those of one space.")
    if min(points.shape[2] for points in flat.values()) < 2:
        raise ConfigError("paths of one dimension have no plane: give (N, steps, 2) or more.")
    return flat


def _array(values: Any) -> np.ndarray:
    values = values.detach().cpu() if isinstance(values, Tensor) else values
    return np.asarray(values, dtype=np.float64)
