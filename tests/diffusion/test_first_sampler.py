"""The sampler of docs/sampler.md, verbatim: one file and one YAML, and it samples and is held to the laws."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_sampler_of_the_docs_works_as_printed(tmp_path, tiny_run):
    page = (ROOT / "docs/sampler.md").read_text()
    files = re.findall(r"`((?:ldm|conf)/\S+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", page, re.DOTALL)
    assert [Path(name).name for name, _ in files] == ["midpoint.py", "midpoint.yaml"]
    copy = tmp_path / "checkout"
    for part in ("ldm", "conf", "tests", "docs", "pyproject.toml", "README.md"):
        source = ROOT / part
        ignored = shutil.ignore_patterns("__pycache__")
        (shutil.copytree(source, copy / part, ignore=ignored) if source.is_dir() else shutil.copy(source, copy / part))
    for name, text in files:
        (copy / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)

    sample = ["task=sample", f"checkpoint={tiny_run}", "prompt=a star", "sampler=midpoint", "num_steps=3", "output=out"]
    drawn = run("-m", "ldm.run", *sample)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert list((copy / "out").glob("*.png"))
    laws = run(
        "-m",
        "pytest",
        "-n",
        "0",
        "tests/diffusion/test_sampler_laws.py",
        "tests/config/test_conf.py",
        "-k",
        "midpoint or sampler]",
    )
    assert laws.returncode == 0, laws.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", laws.stdout).group(1)) > 60
