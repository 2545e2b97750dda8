"""What a run directory holds, as frames, dictionaries and pictures; nothing is written and no network is used."""

from __future__ import annotations

import difflib
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from ldm.allowed import only_allowed
from ldm.errors import ConfigError
from ldm.training.run.directory import read_json
from ldm.training.totals import bin_times, binned
from ldm.untrusted import read_yaml, records

Scalars = dict[str, Any]


class Run:
    """One run directory, read when asked.

    >>> run = Run("outputs/quickstart-01b9e4a5-seed0")
    >>> run.metrics[["step", "train/loss", "val/loss"]]
    >>> run.picture("samples", step=500)
    >>> run.stage("autoencoder").scalars()
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not is_run(self.path):
            raise ConfigError(f"{path} is not a run directory: no config.yaml and run.json there. {nearby(self.path)}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return read_yaml(self.path / "config.yaml")

    @property
    def status(self) -> dict[str, Any]:
        """state (running, stopped, finished), step, time, and the last metrics or the reason."""
        return read_json(self.path / "status.json")

    @property
    def about(self) -> dict[str, Any]:
        """Identity, versions, git commit, command line and hardware."""
        return read_json(self.path / "run.json")

    @property
    def events(self) -> pd.DataFrame:
        """Starts, resumes, stops and finishes, in order."""
        return pd.DataFrame(records(self.path / "events.jsonl"))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a step: step, images, time, and every scalar; what was logged last for a step holds."""
        rows: dict[int, Scalars] = {}
        for record in records(self.path / "metrics.jsonl"):
            if type(record.get("step")) is int:
                numbers = {k: v for k, v in record.items() if isinstance(v, int | float | None)}
                rows.setdefault(record["step"], {}).update(numbers)
        first = ["step", "images", "time"]
        names = sorted({k for row in rows.values() for k in row} - set(first), key=_natural)
        frame = pd.DataFrame([rows[step] for step in sorted(rows)], columns=[*first, *names])
        return frame.astype({name: float for name in names})

    def scalars(self) -> dict[str, float]:
        """The last value of every scalar."""
        frame = self.metrics.drop(columns=["step", "images", "time"])
        return {name: column.dropna().iloc[-1] for name, column in frame.items() if column.notna().any()}  # type: ignore[misc]

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
        folder = self.path / "images"
        said = [p for p in records(folder / "images.jsonl") if _is_picture(p)]
        found = {(p["step"], p["key"]): p for p in said if key in (None, p["key"])}
        there = [p for _, p in sorted(found.items()) if (folder / p["file"]).is_file()]
        rows = [(p["step"], p["key"], folder / p["file"], p["caption"]) for p in there]
        return pd.DataFrame(rows, columns=["step", "key", "path", "caption"])

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
        path = wanted["path"].iloc[-1]
        try:
            return Image.open(path)
        except OSError as error:
            raise ConfigError(f"{path} is no picture that can be read: the run was copied in part.") from error

    @property
    def checkpoints(self) -> list[Path]:
        """Finished checkpoint folders, oldest first."""
        manifests = (self.path / "checkpoints").glob("step-*/manifest.json")
        return sorted(p.parent for p in manifests if p.parent.suffix != ".part")

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json as it stands (metrics, checkpoint, asked), the one written last; {} when there is none."""
        files = set(self.path.glob("evaluation*/evaluation.json"))
        if "path" in self.stages.get("evaluate", {}):
            files.add(self._find(self.stages["evaluate"]["path"]) / "evaluation.json")
        written = sorted((f for f in files if f.is_file()), key=lambda f: f.stat().st_mtime)
        return read_json(written[-1]) if written else {}

    @property
    def scores(self) -> pd.DataFrame:
        """The evaluation's scores: score, value, low and high (95 %), chance, n."""
        return _scores(self.evaluation.get("metrics"))

    @property
    def stages(self) -> dict[str, Any]:
        """What each stage of the experiment made, {} for a run without stages."""
        made = read_json(self.path / "stages.json").items()
        return {name: m for name, m in made if isinstance(m, dict) and _is_text(m.get("path", ""))}

    def stage(self, name: str) -> Run:
        """The run of a stage: `run.stage("autoencoder")`."""
        trained = [s for s, made in self.stages.items() if "path" in made and is_run(self._find(made["path"]))]
        if name not in trained:
            there = f"stages that are runs: {', '.join(trained)}" if trained else "it has no stages.json with runs"
            raise ConfigError(f"{self.path} has no run for the stage {name!r}; {there}.")
        return Run(self._find(self.stages[name]["path"]))

    def _by_t(self, prefix: str, value: str) -> pd.DataFrame:
        metrics = self.metrics
        columns = {name: i for i, name in enumerate(binned(prefix)) if name in metrics}
        frame = metrics[["step", *columns]].rename(columns=columns)  # type: ignore[call-overload]
        frame = frame.melt(id_vars="step", var_name="bin", value_name=value).dropna().sort_values(["step", "bin"])
        frame = frame.astype({"step": int, "bin": int, value: float})
        return frame.assign(t=frame["bin"].map(dict(enumerate(bin_times()))).astype(float)).reset_index(drop=True)

    def _find(self, path: str) -> Path:
        """A path as stages.json has it: relative to the run, so that outputs/ may move as a whole."""
        return (self.path / path).resolve()


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "run.json").is_file()


def nearby(path: Path) -> str:
    """Run directories above, in, or beside a path, the most alike first."""
    above = [p for p in path.resolve().parents if is_run(p)]
    known = next((p for p in path.absolute().parents if p.is_dir()), Path.cwd())
    places = [path] if path.is_dir() else [known]
    inside = [f.parent for place in places for depth in ("*", "*/*") for f in place.glob(f"{depth}/run.json")]
    found = [str(p) for p in [*above, *inside] if is_run(p)]
    close = [*above[:1], *difflib.get_close_matches(str(path.absolute()), found, n=5, cutoff=0.0)]
    if not close:
        return "There is none near it either: python -m ldm.run experiment=quickstart makes one."
    return "Near it: " + ", ".join(dict.fromkeys(map(str, close))) + "."


def _is_picture(record: Scalars) -> bool:
    """Whether a record is one of a picture, as `RunLogger.log_picture` writes it: a file in the folder of pictures."""
    texts = all(_is_text(record.get(k)) for k in ("key", "file", "caption"))
    return texts and type(record.get("step")) is int and Path(record["file"]).name == record["file"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """val/loss_by_t/2 before val/loss_by_t/10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("/"))


def _sigmas(config: dict[str, Any], source: Path) -> dict[int, float]:
    """sigma/alpha at the middle of every time bin, where validation looks at the jump."""
    from ldm.build import build

    made = build(only_allowed({"scheduler": config["scheduler"]}, source)["scheduler"], "scheduler")
    levels = [made.level(made.snap(t)) for t in bin_times()]
    return {i: float(level.ratio) for i, level in enumerate(levels)}


def _scores(said: Any) -> pd.DataFrame:
    said = said if isinstance(said, dict) else {}
    metrics = {k: v for k, v in said.items() if isinstance(v, int | float | None)}
    rows = []
    for name, value in metrics.items():
        if name.rsplit("/", 1)[-1] in ("low", "high", "n", "chance", "se"):
            continue
        error = metrics.get(f"{name}/se")
        both = value is not None and error is not None  # null: not finite
        interval = (value - 1.96 * error, value + 1.96 * error) if both else (None, None)  # type: ignore[operator]
        n = next((metrics[f"{k}/n"] for k in (name, *map(str, Path(name).parents)) if f"{k}/n" in metrics), None)
        low, high = metrics.get(f"{name}/low", interval[0]), metrics.get(f"{name}/high", interval[1])
        rows.append((name, value, low, high, metrics.get(f"{name}/chance"), n))
    frame = pd.DataFrame(rows, columns=["score", "value", "low", "high", "chance", "n"])
    return frame.astype({c: float for c in frame.columns if c != "score"})
