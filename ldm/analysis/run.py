"""What a run directory holds, as frames, dictionaries and pictures; nothing is written and no network is used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.analysis.logged import Logged, Scalars
from ldm.errors import ConfigError
from ldm.training.run.directory import read_json
from ldm.untrusted import read_yaml, records


class Run(Logged):
    """One run directory, read when asked.

    >>> run = Run("outputs/quickstart-01b9e4a5-seed0")
    >>> run.metrics[["step", "train/loss", "val/loss"]]
    >>> run.picture("samples", step=500)
    >>> run.stage("autoencoder").scalars()
    """

    path: Path

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
        return read_yaml(self.path / "config.yaml")

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json")

    @property
    def about(self) -> dict[str, Any]:
        return read_json(self.path / "run.json")

    @property
    def events(self) -> pd.DataFrame:
        return pd.DataFrame(records(self.path / "events.jsonl"))

    def _records(self) -> Iterable[Scalars]:
        return records(self.path / "metrics.jsonl")

    def _pictures(self) -> Iterable[tuple[int, str, Path | str, str]]:
        folder = self.path / "images"
        said = [p for p in records(folder / "images.jsonl") if _is_picture(p)]
        return [(p["step"], p["key"], folder / p["file"], p["caption"]) for p in said if (folder / p["file"]).is_file()]

    @property
    def checkpoints(self) -> list[Path]:
        """Finished checkpoint folders, oldest first."""
        manifests = (self.path / "checkpoints").glob("step-*/manifest.json")
        return sorted(p.parent for p in manifests if p.parent.suffix != ".part")

    @property
    def evaluation_file(self) -> Path | None:
        """The evaluation.json that was written last; its pictures lie beside it."""
        files = set(self.path.glob("evaluation*/evaluation.json"))
        if "path" in self.stages.get("evaluate", {}):
            files.add(self.find(self.stages["evaluate"]["path"]) / "evaluation.json")
        return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_mtime, default=None)

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json as it stands (metrics, checkpoint, asked); {} when there is none."""
        file = self.evaluation_file
        return read_json(file) if file else {}

    @property
    def stages(self) -> dict[str, Any]:
        """What each stage of the experiment made, {} for a run without stages."""
        made = read_json(self.path / "stages.json").items()
        return {name: m for name, m in made if isinstance(m, dict) and _is_text(m.get("path", ""))}

    def stage(self, name: str) -> Run:
        """The run of a stage: `run.stage("autoencoder")`."""
        trained = [s for s, made in self.stages.items() if "path" in made and is_run(self.find(made["path"]))]
        if name not in trained:
            there = f"stages that are runs: {', '.join(trained)}" if trained else "it has no stages.json with runs"
            raise ConfigError(f"{self.path} has no run for the stage {name!r}; {there}.")
        return Run(self.find(self.stages[name]["path"]))

    def find(self, path: str) -> Path:
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
    inside += [f.parent for f in path.absolute().parent.glob("*/run.json")]
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
