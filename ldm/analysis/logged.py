"""What a run has logged, as frames and pictures, wherever it is kept: a run directory, W&B's files, W&B's server."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd
from PIL import Image

from ldm.allowed import only_allowed
from ldm.errors import ConfigError
from ldm.metrics import AROUND
from ldm.training.totals import bin_times, binned

Scalars = dict[str, Any]
FIRST = ("step", "images", "time")


class Logged:
    """What is known of one run. A kind of it says where its records, pictures and configuration are.

    path: where it is kept.
    """

    path: Path | str

    @property
    def name(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} must say what its run is called.")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        raise NotImplementedError(f"{type(self).__name__} must say where its configuration is.")

    @property
    def status(self) -> dict[str, Any]:
        """state (running, stopped, finished), step, time, and the last metrics or the reason."""
        raise NotImplementedError(f"{type(self).__name__} must say how its run stands.")

    @property
    def about(self) -> dict[str, Any]:
        """Identity, versions, git commit, command line and hardware."""
        return {}

    @property
    def events(self) -> pd.DataFrame:
        """Starts, resumes, stops and finishes, in order: time, event, step."""
        return pd.DataFrame()

    def _records(self) -> Iterable[Scalars]:
        """What was logged, in order: step, images, time and scalars."""
        raise NotImplementedError(f"{type(self).__name__} must say where its records are.")

    def _pictures(self) -> Iterable[tuple[int, str, Path | str, str]]:
        """(step, key, path, caption) of each picture, in the order of logging."""
        raise NotImplementedError(f"{type(self).__name__} must say where its pictures are.")

    def _local(self, path: Path | str) -> Path:
        """The file of a picture on this machine."""
        return Path(path)

    @property
    def evaluation(self) -> dict[str, Any]:
        """What the evaluation wrote, under "metrics" its numbers; {} when there is none."""
        return {}

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a step: step, images, time, and every scalar; what was logged last for a step holds."""
        rows = self._rows()
        names = sorted({k for row in rows.values() for k in row} - set(FIRST), key=_natural)
        frame = pd.DataFrame([rows[step] for step in sorted(rows)], columns=[*FIRST, *names])
        return frame.astype({name: float for name in names})

    def scalars(self) -> dict[str, float]:
        """The last finite value of every scalar."""
        return _last(self._rows())

    def loss_by_t(self) -> pd.DataFrame:
        """The loss by time bin, long: step, split (train, val), bin, t (middle of the bin), loss."""
        parts = [self._by_t(f"{split}/loss_by_t", "loss").assign(split=split) for split in ("train", "val")]
        return pd.concat(parts, ignore_index=True)[["step", "split", "bin", "t", "loss"]]

    def x0_error(self) -> pd.DataFrame:
        """The squared error of the jump to x0 in validation, long: step, bin, t, sigma (sigma/alpha), x0_error."""
        frame = self._by_t("val/x0_error_by_t", "x0_error")
        sigma = _sigmas(self.config, self.path) if len(frame) else {}
        return frame.assign(sigma=frame["bin"].map(sigma))[["step", "bin", "t", "sigma", "x0_error"]]

    def pictures(self, key: str | None = None) -> pd.DataFrame:
        """The logged pictures, of one key or all: step, key, path, caption."""
        found = {(p[0], p[1]): p for p in self._pictures() if key in (None, p[1])}
        return pd.DataFrame([found[k] for k in sorted(found)], columns=["step", "key", "path", "caption"])

    def picture(self, key: str, step: int | None = None) -> Image.Image:
        """One logged picture, the newest of its key unless a step is given."""
        every = self.pictures()
        of_key = every[every["key"] == key]
        if of_key.empty:
            keys = ", ".join(sorted(set(every["key"]))) or "none yet"
            raise ConfigError(f"{self.path} has no picture {key!r}; it has: {keys}.")
        wanted = of_key if step is None else of_key[of_key["step"] == step]
        if wanted.empty:
            raise ConfigError(f"{self.path} has {key!r} at steps {list(of_key['step'])}, not at {step}.")
        path = self._local(wanted["path"].iloc[-1])
        try:
            return Image.open(path)
        except OSError as error:
            raise ConfigError(f"{path} is no picture that can be read: the run was copied in part.") from error

    @property
    def scores(self) -> pd.DataFrame:
        """The evaluation's scores: score, value, low and high (95 %), chance, n."""
        frame = pd.DataFrame(scores_of(self.evaluation), columns=["score", "value", "low", "high", "chance", "n"])
        return frame.astype({c: float for c in frame.columns if c != "score"})

    def last(self) -> tuple[int, dict[str, float]]:
        """(last step that was logged, last finite value of every scalar), read in one go."""
        rows = self._rows()
        return max(rows, default=0), _last(rows)

    def _rows(self) -> dict[int, Scalars]:
        rows: dict[int, Scalars] = {}
        for record in self._records():
            if type(record.get("step")) is int:
                numbers = {k: v for k, v in record.items() if v is None or type(v) is float or is_number(v)}
                rows.setdefault(record["step"], {}).update(numbers)
        return rows

    def _by_t(self, prefix: str, value: str) -> pd.DataFrame:
        metrics = self.metrics
        columns = {name: i for i, name in enumerate(binned(prefix)) if name in metrics}
        frame = metrics[["step", *columns]].rename(columns=columns)  # type: ignore[call-overload]
        frame = frame.melt(id_vars="step", var_name="bin", value_name=value).dropna().sort_values(["step", "bin"])
        frame = frame.astype({"step": int, "bin": int, value: float})
        return frame.assign(t=frame["bin"].map(dict(enumerate(bin_times()))).astype(float)).reset_index(drop=True)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value out of a file is a finite number that floats hold."""
    if isinstance(value, int):
        return value.bit_length() < 1000
    return isinstance(value, float) and math.isfinite(value)


def parts_of(config: dict[str, Any], names: Iterable[str], source: Any) -> dict[str, Any]:
    """Objects of a configuration's nodes: of ours, torch's and what LDM_ALLOW names alone."""
    from ldm.build import build

    wanted = {name: config.get(name) for name in names}
    return {name: build(node, name) for name, node in only_allowed(wanted, source).items()}


def _last(rows: dict[int, Scalars]) -> dict[str, float]:
    latest: dict[str, float] = {}
    for step in sorted(rows, reverse=True):
        for key, value in rows[step].items():
            if key not in latest and value is not None and math.isfinite(value):
                latest[key] = float(value)
    return {k: latest[k] for k in sorted(latest, key=_natural) if k not in FIRST}


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """val/loss_by_t/2 before val/loss_by_t/10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("/"))


def _sigmas(config: dict[str, Any], source: Any) -> dict[int, float]:
    """sigma/alpha at the middle of every time bin, where validation looks at the jump."""
    made = parts_of(config, ["scheduler"], source)["scheduler"]
    levels = [made.level(made.snap(t)) for t in bin_times()]
    return {i: float(level.ratio) for i, level in enumerate(levels)}


def scores_of(
    evaluation: dict[str, Any],
) -> list[tuple[str, float | None, float | None, float | None, float | None, Any]]:
    """(score, value, low, high, chance, n) of each number in what an evaluation wrote that is a score."""
    said = evaluation.get("metrics")
    metrics = {k: v for k, v in said.items() if v is None or is_number(v)} if isinstance(said, dict) else {}
    rows = []
    for name, value in metrics.items():
        if name.rsplit("/", 1)[-1] in AROUND:
            continue
        error = metrics.get(f"{name}/se")
        both = value is not None and error is not None  # null: not finite
        interval = (value - 1.96 * error, value + 1.96 * error) if both else (None, None)  # type: ignore[operator]
        n = next((metrics[f"{k}/n"] for k in (name, *map(str, Path(name).parents)) if f"{k}/n" in metrics), None)
        low, high = metrics.get(f"{name}/low", interval[0]), metrics.get(f"{name}/high", interval[1])
        rows.append((name, value, low, high, metrics.get(f"{name}/chance"), n))
    return rows
