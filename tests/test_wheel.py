"""A wheel, installed elsewhere, has its configurations and takes a user's own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_runs_from_an_empty_directory(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    made = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    own = tmp_path / "own/experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\n# Mine.\nmax_steps: 77\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", "import ldm.run; ldm.run.main()", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import ldm; print(ldm.__file__)"]
    found = subprocess.run(where, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert str(tmp_path / "site") in found.stdout, "the wheel's package must be the one that runs"
    assert "quickstart" in run("--help")
    assert "max_steps: 77" in run("experiment=mine", "--config-dir", str(tmp_path / "own"), "--cfg", "job")
    assert "unet.UNet" in run("experiment=quickstart", "--cfg", "job")
    assert not list((tmp_path / "empty").iterdir())
