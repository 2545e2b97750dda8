"""Notebooks run from top to bottom on a real run, are committed without outputs, and use ldm.analysis alone."""

import ast
import os
import re
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


@pytest.mark.slow
def test_runs_from_top_to_bottom_with_pictures(path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_RUN", str(tiny_run))
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")}
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")} == before  # looking changes nothing
    if keep := os.environ.get("LDM_KEEP_NOTEBOOKS"):  # a folder to look at the executed notebooks in
        nbformat.write(notebook, Path(keep) / path.name)
