"""sweep=random and sweep=optuna, and arms in processes of their own: which arms run, which run again, what is said."""

import csv
import json
import os
from pathlib import Path

import optuna
import pandas as pd
import pytest
import stub_task
from commands import here

STUB = ["-m", "task._target_=stub_task.Stub", "name=s"]
OPTUNA = ["sweep=optuna", "optimized_metric=val/loss"]


@pytest.fixture(autouse=True)
def _stub(monkeypatch):
    monkeypatch.setenv("LDM_ALLOW", "stub_task")
    for seen in (stub_task.CALLS, stub_task.STEPS, stub_task.LOGGERS):
        seen.clear()


def rows(folder):
    return list(csv.DictReader((folder / "outputs/s/results.csv").open()))


def arms():
    return [(steps, seed) for steps, (seed, _) in zip(stub_task.STEPS, stub_task.CALLS, strict=True)]


@pytest.mark.slow
def test_random_points_are_the_same_ones_again_and_more_of_them(tmp_path):
    typed = [
        *STUB,
        "sweep=random",
        "max_steps=int(interval(10,60))",
        "seed=0,1",
        "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    ]
    for n in (2, 3):
        assert here(*typed, f"sweep.n_trials={n}", cwd=tmp_path).returncode == 0
    first, longer = arms()[:4], arms()[4:]
    assert longer[:4] == first and len(set(longer)) == 6 and {seed for _, seed in longer} == {0, 1}
    found = rows(tmp_path)
    assert len(found) == 6 and all(1e-4 <= float(r["optimizer.lr"]) <= 1e-1 for r in found)
    summary = pd.read_csv(tmp_path / "outputs/s/summary.csv")
    assert list(summary["n"]) == [2, 2, 2] and not summary["mean"].isna().any()


@pytest.mark.slow
def test_random_choices_end_when_all_are_there(tmp_path):
    done = here(*STUB, "sweep=random", "max_steps=choice(4,5)", "data.crop=centre,random", cwd=tmp_path)
    assert done.returncode == 0 and len(rows(tmp_path)) == 4 == len(set(stub_task.CALLS))


@pytest.mark.slow
def test_optuna_asks_once_for_each_point_and_tries_failed_ones_again(tmp_path, monkeypatch):
    """A refused point is not drawn for ever, the other seeds of a point are its replicates, a study goes on."""
    typed = [*STUB, *OPTUNA, "max_steps=5,6,7,8", "seed=0,1", "sweep.n_trials=10"]
    monkeypatch.setenv("STUB_FAILS", "1")
    done = here(*typed, cwd=tmp_path)
    assert done.returncode == 3 and sorted(arms()) == [(n, s) for n in (5, 6, 7, 8) for s in (0, 1)]
    states = {(r["max_steps"], r["seed"]): r["state"] for r in rows(tmp_path)}
    expected = {"5": "finished", "6": "finished", "7": "refused", "8": "failed"}
    assert states == {(n, s): state for n, state in expected.items() for s in "01"}
    assert "best setting (lowest val/loss, 4.75 " in done.stdout and "max_steps=5" in done.stdout
    stub_task.CALLS.clear(), stub_task.STEPS.clear()
    monkeypatch.delenv("STUB_FAILS")
    assert here(*typed, cwd=tmp_path).returncode == 0 and arms() == [(8, 0), (8, 1)]
    assert here(*typed, cwd=tmp_path).returncode == 0 and len(arms()) == 2, "nothing is missing"
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/outputs/s/study.db")
    assert study.best_params == {"max_steps": "5"} and study.best_value == 4.75


@pytest.mark.slow
def test_optuna_goes_on_with_more_points_and_finds_better_ones(tmp_path):
    typed = [*STUB, *OPTUNA, "max_steps=int(interval(1,99))"]
    for n in (4, 12):
        assert here(*typed, f"sweep.n_trials={n}", cwd=tmp_path).returncode == 0
        assert len(stub_task.STEPS) == n == len(set(stub_task.STEPS)), "each point once, in both commands together"
    refused = here(*typed[:-1], "max_steps=int(interval(1,98))", cwd=tmp_path)
    assert refused.returncode == 2 and "study 's' of another parameters" in refused.stderr
    assert refused.stderr.count("\n") == 1 and len(stub_task.STEPS) == 12


BAD = [  # typed after -m, what the line says
    (["seed=1,2", "sweep=optuna"], "optimized_metric="),
    (["max_steps=interval(1,9)"], "sweep=random or sweep=optuna"),
    (["max_steps=interval(1,9)", "sweep=random", "sweep.n_trials=0"], "sweep.n_trials=0: at least 1"),
    (["seed=1,2", "sweep.n_jobs=2"], "hydra/launcher=processes"),
    (["seed=1,2", "sweep=optunaa"], "'optuna'"),
    (["seed=1,2", "sweep.n_trials=3"], "sweep=optuna|random"),
    (["seed=interval(1,3)", "sweep=random"], "seed=0,1,2"),
    (["optimizer.lr=tag(log,interval(0,1))", "sweep=random"], "above 0"),
    ([*OPTUNA, "max_steps=interval(1,9)", "sweep.storage=nonsense"], "sweep.storage=nonsense"),
    ([*OPTUNA, "seed=1,2"], "nothing is searched"),
    (["outputs=file", "seed=1,2"], "cannot be written"),
    (["seed=1,2", "hydra/launcher=process"], "'processes'"),
]


@pytest.mark.parametrize(("typed", "words"), BAD, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "")
def test_what_cannot_be_searched_is_one_line(typed, words, tmp_path):
    (tmp_path / "file").touch()
    done = here(*STUB, *typed, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not stub_task.CALLS


def test_a_single_run_has_no_sweep(tmp_path):
    done = here("experiment=quickstart", "sweep=optuna", cwd=tmp_path)
    assert done.returncode == 2 and "-m" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_misspelt_metric_to_prune_by_is_refused_before_anything_is_trained(tmp_path):
    typed = ["-m", "experiment=quickstart", "debug=fast_dev_run", *OPTUNA, "optimizer.lr=interval(1e-4,1e-2)"]
    done = here(*typed, "sweep.pruned_by=val/los", cwd=tmp_path)
    assert done.returncode == 2 and "sweep.pruned_by=val/los" in done.stderr and "'val/loss'" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("outputs/stages/*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "seeds"), [(["processes", "sweep.n_jobs=2"], "97,3,1"), (["joblib", "sweep.n_jobs=1"], "97")]
)
def test_a_killed_arm_is_a_row_and_the_others_run(launcher, seeds, tmp_path, monkeypatch):
    path = [str(Path(stub_task.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    typed = [*STUB, f"seed={seeds}", f"hydra/launcher={launcher[0]}", *launcher[1:]]
    done = here(*typed, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    found = {r["seed"]: (r["state"], r.get("val/loss", ""), r["message"]) for r in rows(tmp_path)}
    expected = {"97": ("failed", "", "killed by signal 9 (kill -9, or out of memory)")}
    expected |= {"3": ("finished", "0.25", ""), "1": ("finished", "0.5", "")} if "3" in seeds else {}
    assert found == expected and list(found) == seeds.split(","), "in the order typed, whoever was first"
    assert "Traceback" not in done.stderr
    assert not stub_task.CALLS, "none ran in this process"


@pytest.mark.slow
def test_arms_are_together_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "mine")
    assert here(*STUB, "logger=offline", "seed=1,2", "experiment=quickstart", cwd=tmp_path).returncode == 0
    assert [(node["group"], list(node["tags"])) for node in stub_task.LOGGERS] == [
        ("s", ["mine", "seed=1"]),
        ("s", ["mine", "seed=2"]),
    ]


@pytest.mark.slow
def test_rows_of_a_sweep_know_their_seed(tmp_path):
    assert here(*STUB, "max_steps=4,5", cwd=tmp_path).returncode == 0
    assert [r["seed"] for r in rows(tmp_path)] == ["0", "0"], "also where none was typed"
    lines = [json.loads(line) for line in (tmp_path / "outputs/s/results.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1]
