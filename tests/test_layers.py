"""A file imports only from its own room and from rooms above it; third parties only where design allows them."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms from the ground up; a module belongs to the longest prefix that fits it.
ROOMS = [
    "ldm.errors",
    "ldm.atomic",
    "ldm.launch",
    "ldm.untrusted",
    "ldm.devices",
    "ldm.diffusion",
    "ldm.models",
    "ldm.autoencoders",
    "ldm.text",
    "ldm.adapters",
    "ldm.pictures",
    "ldm.sampling",
    "ldm.data",
    "ldm.config.root",
    "ldm.config.keys",
    "ldm.config.schema",
    "ldm.config.check",
    "ldm.build",
    "ldm.config.choices",
    "ldm.allowed",
    "ldm.formats",
    "ldm.features",
    "ldm.metrics",
    "ldm.checkpoints",
    "ldm.pipeline",
    "ldm.evaluation",
    "ldm.training",
    "ldm.memory",
    "ldm.cost",
    "ldm.analysis",
    "ldm.report",
    "ldm.sweep",
    "ldm.tasks",
    "ldm.config.explain",
    "ldm.config.help",
    "ldm.run",
    "ldm.launched",
]
ONLY_IN = {  # third party -> rooms that may import it
    "hydra": ("ldm.config", "ldm.build", "ldm.run", "ldm.sweep", "ldm.tasks"),
    "omegaconf": (
        "ldm.config",
        "ldm.build",
        "ldm.run",
        "ldm.sweep",
        "ldm.tasks",
        "ldm.training.run.build",
        "ldm.launched",
    ),
    "lightning": ("ldm.training", "ldm.data", "ldm.cost.trial"),
    "webdataset": ("ldm.data",),
    "transformers": ("ldm.text", "ldm.training.run", "ldm.features"),
    "torchmetrics": ("ldm.metrics", "ldm.tasks"),
    "wandb": ("ldm.training.run.wandb_mirror", "ldm.analysis.wandb_runs"),
    "pandas": ("ldm.analysis", "ldm.report.sweep", "ldm.data", "ldm.tasks.work.lengths"),
    "jinja2": ("ldm.report",),
    "huggingface_hub": ("ldm.formats",),
    "optuna": ("ldm.training.callbacks.pruning",),
    "diffusers": (),
    "torchvision": (),
}
FILES = sorted((ROOT / "ldm").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the room"
            found.append(node.module)
    return found


def room(name: str) -> int:
    fits = [i for i, r in enumerate(ROOMS) if name == r or name.startswith(r + ".")]
    assert fits, f"{name} is in no room: add it to ROOMS where it belongs"
    return fits[0]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_upwards(path):
    name = module_name(path)
    if name in ("ldm", "ldm.config"):
        return
    for imported in imports(path):
        top = imported.split(".")[0]
        if top == "ldm" and imported != "ldm":
            assert room(imported) <= room(name), f"{name} imports {imported}, which stands below it"
        elif top in ONLY_IN:
            allowed = ONLY_IN[top]
            assert any(name == a or name.startswith(a + ".") for a in allowed), f"{name} may not import {top}"


def test_the_core_needs_torch_only():
    known = {"torch", "ldm", "scipy"}
    import sys

    for path in (ROOT / "ldm/diffusion").rglob("*.py"):
        tops = {i.split(".")[0] for i in imports(path)}
        assert not tops - known - set(sys.stdlib_module_names), path


def test_all_exchanges_of_processes_are_in_one_file():
    """So that each is known to work under NCCL, which carries nothing for host tensors, and to be met by all."""
    exchanges = {"all_reduce", "all_gather", "broadcast", "barrier", "gather", "scatter", "reduce", "reduce_scatter"}
    exchanges |= {"all_gather_into_tensor", "all_gather_object", "broadcast_object_list", "new_group", "send", "recv"}
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in exchanges and isinstance(node.value, ast.Name):
                found |= {module_name(path)} if node.value.id in ("dist", "distributed", "strategy") else set()
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                assert not exchanges & {a.name for a in node.names}, path
    assert found == {"ldm.training.distributed.collectives"}


def test_files_are_short():
    long = {module_name(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_no_code_is_run_from_files():
    for path in FILES:
        text = path.read_text()
        for forbidden in ("weights_only=False", "allow_pickle=True", "import pickle", "eval(", "exec("):
            if forbidden in ("eval(", "exec("):
                assert f" {forbidden}" not in text.replace(".eval(", ""), f"{path}: {forbidden}"
            else:
                assert forbidden not in text, f"{path}: {forbidden}"


def test_the_top_level_is_what_was_agreed():
    agreed = {"conf", "ldm", "experiments", "tests", "notebooks", "pyproject.toml", "README.md", "constraints.txt"}
    agreed |= {"docs", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {f.split("/")[0] for f in files}
    assert {t for t in tops if not t.startswith(".")} <= agreed


def test_a_folder_can_be_overlooked():
    """At most twelve files, so that a name is found by looking; the samplers are one a file, and more than that."""
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert not {str(f): n for f, n in folders.items() if n > 12 and f.name != "samplers"}
