"""The page of a sweep: settings with their differences, what each draws, and arms without a result."""

from pathlib import Path

from commands import here
from PIL import Image
from test_report import EVIL, checked, words
from written_runs import written_run

from ldm.report.sweep import write_sweep
from ldm.sweep.arms import Arm, record
from ldm.training.run.logging import RunLogger


def swept(folder: Path) -> Path:
    """Two settings with two seeds, one arm that failed, one that was refused."""
    for i, parameterization in enumerate(("v", "eps")):
        for seed in (0, 1):
            arm = Arm(folder, ["experiment=law", f"parameterization={parameterization}", f"seed={seed}"])
            run = written_run(arm.directory, {"seed": seed})
            RunLogger(run.path).log_picture("samples", Image.new("RGB", (4, 4)), 3)
            record(arm, "finished", {"val/loss": 0.5 + 0.1 * i + 0.01 * i * seed, "seen/all": 0.5, "train/loss": 1}, "")
    record(Arm(folder, ["experiment=law", "parameterization=x0", "seed=0"]), "failed", {}, f"diverged {EVIL}")
    record(Arm(folder, ["experiment=law", "parameterization=x0", "seed=1"]), "refused", {}, "cannot be")
    return folder


def test_a_sweep_has_a_page(tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep")
    (next(folder.glob("*v*0*-*")) / "report.html").write_text("")
    path = write_sweep(folder)
    text = path.read_text()
    said = words(text)
    assert "6 arms over parameterization (3), with 2 seeds: 4 finished, 1 failed and 1 refused" in said
    assert "parameterization=v 0.5 to 0.5, 2 seeds 0.5 baseline" in said and "+0.105 (" in said
    assert text.count("<img") == 2 and "parameterization=eps, after step 3" in said
    assert f"diverged {EVIL}" in said and EVIL not in text and "cannot be" in said
    assert text.count("<a href=") == 1 and "seen/all" in said
    for title in ("Loss", "Every arm", "Differences", "What mattered"):
        assert f"<h3>{title}</h3>" in text
    done = here("task=report", f"checkpoint={folder}", f"output={tmp_path}/page.html", cwd=tmp_path)
    assert done.returncode == 0 and "<a " not in checked(tmp_path / "page.html")


def test_a_sweep_that_has_nothing_yet_or_is_cut(tmp_path: Path) -> None:
    record(Arm(tmp_path / "s", ["a=1"]), "failed", {}, "no")
    assert "No arm has a value" in words(checked(write_sweep(tmp_path / "s")))
    (tmp_path / "s/results.csv").write_text("a,state,message,directory\n1,fin")
    done = here("task=report", f"checkpoint={tmp_path}/s", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "cut in line 2" in done.stderr
