"""Notebooks run from top to bottom on tiny real runs, are committed without outputs, and say what a figure shows."""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from commands import here
from jupyter_client import KernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LOOKING = [path for path in NOTEBOOKS if path.stem.startswith(("01_", "05_"))]  # at what is on disk already
FIRST = NOTEBOOKS[0]


def name(path: Path) -> str:
    return path.stem


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def plain(source: str) -> str:
    """Without the lines that only IPython reads."""
    return re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in code(path):
        assert not cell.outputs and cell.execution_count is None, f"nbstripout {path}"


@pytest.mark.parametrize("path", LOOKING, ids=name)
def test_looking_imports_nothing_of_ldm_but_analysis(path: Path) -> None:
    nodes = list(ast.walk(ast.parse("\n".join(plain(cell.source) for cell in code(path)))))
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    of_ldm = {m for m in modules if m.split(".")[0] == "ldm"}
    assert of_ldm == {"ldm.analysis"}


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if not p.stem.startswith("02_")], ids=name)  # needs no run
def test_a_path_that_is_no_run_is_said_in_a_line(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("LDM_RUN", "LDM_SWEEP"):
        monkeypatch.setenv(key, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"none.* is not ") as refused:
        exec(plain(code(path)[0].source), {})
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def tiny_sweep(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real sweep over the tiny run's latents: two settings, two seeds. Never write in it."""
    folder = tmp_path_factory.mktemp("sweep")
    latents = (tiny_run / json.loads((tiny_run / "stages.json").read_text())["encode"]["path"]).resolve()
    tiny = ["model=unet_tiny", "autoencoder=kl_tiny", "text_encoder=small_tiny", "trainer=debug", "logger=none"]
    tiny += ["max_steps=3", "batch_size=2", "callbacks.losses.every_n_steps=1", "data.validation_samples=4"]
    tiny += ["callbacks.validation.every_n_steps=2", "callbacks.samples=null", "callbacks.jump_to_x0=null"]
    done = here("-m", f"shards={latents}", *tiny, "parameterization=eps,v", "seed=0,1", "name=sweep", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "sweep"


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all notebooks, because what they import takes seconds; each begins without the names of the others."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(FIRST.parent))
    yield manager
    manager.shutdown_kernel(now=True)


def executed(path: Path, kernel: KernelManager, **environment: str) -> list[nbformat.NotebookNode]:
    """The cells of a notebook after it ran from top to bottom."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.environ.update({environment!r})"))
    NotebookClient(notebook, km=kernel, timeout=120).execute()
    del notebook.cells[0]
    if keep := os.environ.get("LDM_KEEP_NOTEBOOKS"):  # a folder to look at the executed notebooks in
        nbformat.write(notebook, Path(keep) / path.name)
    return notebook.cells


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_runs_from_top_to_bottom_and_says_what_its_figures_show(
    path: Path, kernel: KernelManager, tiny_run: Path, tiny_sweep: Path, tmp_path: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (*tiny_run.rglob("*"), *tiny_sweep.rglob("*"))}
    given = {"LDM_RUN": tiny_run, "LDM_SWEEP": tiny_sweep, "LDM_WORK": tmp_path, "LDM_STEPS": 2}
    cells = executed(path, kernel, **{key: str(value) for key, value in given.items()})
    outputs = [cell.get("outputs", ()) for cell in cells]
    drawn = [i for i, several in enumerate(outputs) if any("image/png" in o.get("data", {}) for o in several)]
    assert drawn and cells[-1].cell_type == "markdown"
    silent = [cells[i].source for i in drawn if cells[i + 1].cell_type != "markdown"]
    assert not silent, f"no word on what these figures show: {silent}"
    assert {p: p.stat().st_mtime_ns for p in before} == before  # runs are as they were


@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 1], ids=["nothing logged", "one line logged"])
def test_a_run_that_is_still_training_has_some_of_it_later(
    lines: int, kernel: KernelManager, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "begun"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("images", "evaluation*", "stages.json", "report*"))
    logged = (tiny_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(logged[:lines]))
    (run / "status.json").write_text('{"state": "running", "step": 1}')
    cells = executed(FIRST, kernel, LDM_RUN=str(run))
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("has no picture 'samples'; it has: none yet" in o.get("text", "") for o in outputs)
