"""Any stage may be left out: what is left works, or is refused in one line before anything is made."""

import json
import shlex
from itertools import combinations

import pytest
from commands import here
from conf_nodes import CONF, composed

import ldm.tasks.work.stages as training
from ldm.config.root import plain
from ldm.tasks.work.stages import Stages

ASK = ["experiment=quickstart", "debug=fast_dev_run", "logger=none", "name=x", "eval_images=2"]
STAGES = ("prepare", "autoencoder", "encode", "diffusion", "evaluate", "report")
# Few left out, or few left: what lies between are no other rules, and each composes for half a second.
SUBSETS = [off for n in (0, 1, 2, 5, 6) for off in combinations(STAGES, n)]


def typed(off, cwd):
    return here(*ASK, *(f"stages.{stage}=false" for stage in off), cwd=cwd)


@pytest.mark.slow
def test_subsets_are_taken_or_refused_in_a_line_before_anything_is_made(tmp_path, monkeypatch):
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


def test_the_first_stage_has_terms_and_perturbations_of_its_own():
    """Named by the stage, they are in its module and in no other; the rest of its module is as ever."""
    typed = ["+loss@stages.autoencoder.module.losses.perceptual=perceptual_random"]
    typed += ["+perturbation@stages.autoencoder.module.perturbations.noise=noise"]
    typed += ["stages.autoencoder.module.perturbations.noise.std=0.5"]
    plainly, ours = composed("experiment=quickstart"), composed("experiment=quickstart", *typed)
    module = plain(Stages(ours).configured("autoencoder"))["module"]
    assert module["losses"].pop("perceptual")["features"] == "random"
    assert module["perturbations"].pop("noise")["std"] == 0.5
    assert "perceptual" not in Stages(ours).configured("diffusion").module.losses
    assert module == plain(Stages(plainly).configured("autoencoder"))["module"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["ae_small", "ae_kl_f8", "ae_vq_f4", "ae_dc_f32"])
def test_autoencoders_run_tiny_as_their_files_say(experiment, tmp_path):
    """The run itself, by its name, with both terms; scored and reported."""
    line = next(t for t in (CONF / f"experiment/{experiment}.yaml").read_text().splitlines() if "Tiny, here" in t)
    typed = shlex.split(line.split(": ", 1)[1])
    assert typed[0] == "debug=fast_dev_run"
    done = here(f"experiment={experiment}", *typed, "logger=none", "name=mine", cwd=tmp_path)
    run = tmp_path / "outputs/mine"
    assert done.returncode == 0 and (run / "report.html").is_file(), done.stderr
    metrics = json.loads((run / "status.json").read_text())["metrics"]
    assert {"train/perceptual_random", "train/discriminator", "val/psnr"} <= metrics.keys()
    scores = json.loads(next(run.glob("evaluation*/evaluation.json")).read_text())["metrics"]
    assert {"reconstruction/psnr", "reconstruction/lpips_random", "reconstruction/gradient_energy"} <= scores.keys()
