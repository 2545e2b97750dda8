"""Any stage may be left out: what is left works, or is refused in one line before anything is made."""

from itertools import combinations

import pytest
from commands import here

import ldm.tasks.work.stages as training

ASK = ["experiment=quickstart", "debug=fast_dev_run", "logger=none", "name=x", "eval_images=2"]
STAGES = ("prepare", "autoencoder", "encode", "diffusion", "evaluate", "report")
SUBSETS = [off for n in range(len(STAGES) + 1) for off in combinations(STAGES, n)]


def typed(off, cwd):
    return here(*ASK, *(f"stages.{stage}=false" for stage in off), cwd=cwd)


@pytest.mark.slow
def test_every_subset_is_taken_or_refused_in_a_line_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Stages, "run", lambda self: {})
    taken = []
    for off in SUBSETS:
        done = typed(off, tmp_path)
        assert (done.returncode, done.stderr.count("\n")) in ((0, 0), (2, 1)), (off, done.stderr)
        taken += [off] if done.returncode == 0 else []
    assert ("diffusion",) in taken and ("evaluate", "report") in taken and STAGES not in taken
    assert ("autoencoder", "diffusion") not in taken and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_left_works(tmp_path):
    """Without a diffusion model the autoencoder is scored and reported."""
    for off in (("diffusion",), ("encode", "diffusion"), ("diffusion", "report"), ("evaluate",)):
        done = typed(off, tmp_path)
        assert done.returncode == 0, (off, done.stderr)
    (autoencoder,) = (tmp_path / "outputs" / "stages").glob("autoencoder-*")
    assert (autoencoder / "report.html").is_file() and list(autoencoder.glob("evaluation-*/evaluation.json"))
