"""Notebooks run from top to bottom on a real run, are committed without outputs, and use ldm.analysis alone."""

import ast
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_outputs_are_stripped(path: Path) -> None:
    for cell in code(path):
        assert not cell.outputs and cell.execution_count is None, f"nbstripout {path}"


def test_imports_nothing_of_ldm_but_analysis(path: Path) -> None:
    source = "\n".join(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE) for cell in code(path))
    nodes = list(ast.walk(ast.parse(source)))
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    of_ldm = {m for m in modules if m.split(".")[0] == "ldm"}
    assert of_ldm == {"ldm.analysis"}


def executed(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


@pytest.mark.slow
def test_runs_from_top_to_bottom_with_pictures(path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_RUN", str(tiny_run))
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")}
    notebook = executed(path)
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")} == before  # looking changes nothing
    if keep := os.environ.get("LDM_KEEP_NOTEBOOKS"):  # a folder to look at the executed notebooks in
        nbformat.write(notebook, Path(keep) / path.name)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 1], ids=["nothing logged", "one line logged"])
def test_a_run_that_is_still_training_has_some_of_it_later(
    lines: int, path: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "begun"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("images", "evaluation*", "stages.json", "report*"))
    logged = (tiny_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(logged[:lines]))
    (run / "status.json").write_text('{"state": "running", "step": 1}')
    monkeypatch.setenv("LDM_RUN", str(run))
    outputs = [o for cell in executed(path).cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("has no picture 'samples'; it has: none yet" in o.get("text", "") for o in outputs)
