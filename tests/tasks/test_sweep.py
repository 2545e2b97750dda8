"""A sweep: every arm is a row, whatever becomes of it, in a directory of its own; what ends it, ends it at once."""

import csv
import json
from pathlib import Path

import pytest
import stub_task
from commands import here, ldm

from ldm.config.root import conf_dir
from ldm.run import named_sweep, quoted
from ldm.sweep.arms import Arm, record
from ldm.sweep.end import best_arm
from ldm.sweep.measured import check_optimized

STUB = ["-m", "task._target_=stub_task.Stub", "name=s"]


@pytest.fixture(autouse=True)
def _stub(monkeypatch):
    monkeypatch.setenv("LDM_ALLOW", "stub_task")
    stub_task.CALLS.clear()


def rows(sweep):
    return list(csv.DictReader((sweep / "results.csv").open()))


def test_rows_are_replaced_by_a_repeated_arm(tmp_path):
    one, two = (Arm(tmp_path, ["experiment=x", f"seed={n}"], ["experiment"]) for n in (1, 2))
    record(one, "refused", {}, "a reason, with a comma")
    record(two, "finished", {"val/loss": 0.5}, "")
    record(one, "finished", {"val/loss": 0.25}, "")
    assert [(r["seed"], r["state"], r["val/loss"]) for r in rows(tmp_path)] == [
        ("1", "finished", "0.25"),
        ("2", "finished", "0.5"),
    ]


@pytest.mark.slow
def test_an_arm_that_fails_is_a_row_and_the_others_run(tmp_path):
    done = here(*STUB, "seed=90,91,92,96,3", "optimized_metric=val/loss", cwd=tmp_path)
    assert done.returncode == 3 and [seed for seed, _ in stub_task.CALLS] == [90, 91, 92, 96, 3]
    found = {r["seed"]: (r["state"], r["val/loss"], r["message"]) for r in rows(tmp_path / "outputs/s")}
    assert found == {
        "90": ("failed", "", "Diverged: the training loss is nan at step 2"),
        "91": ("refused", "", "this cannot be: type something else"),
        "92": ("failed", "", "RuntimeError: out of memory, and more lines"),
        "96": ("finished", "", ""),
        "3": ("finished", "0.25", ""),
    }
    directories = {seed: arm for seed, arm in stub_task.CALLS}
    assert "stub_task.py" in (tmp_path / directories[92] / "traceback.txt").read_text()
    assert "Traceback" not in done.stderr and done.stderr.count("failed: seed=9") == 2
    assert f"best arm (lowest val/loss, 0.25): {directories[3]}\ntable: outputs/s/results.csv\n" in done.stdout
    assert here(*STUB, "seed=91,1", cwd=tmp_path).returncode == 0, "an arm that cannot be is no failure"


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "code"), [(93, 130), (94, 130), (95, 75)])
def test_what_interrupts_an_arm_ends_the_sweep(seed, code, tmp_path):
    done = here(*STUB, f"seed=1,{seed},2", cwd=tmp_path)
    assert done.returncode == code and [n for n, _ in stub_task.CALLS] == [1, seed]
    states = {r["seed"]: r["state"] for r in rows(tmp_path / "outputs/s")}
    assert states == {"1": "finished", str(seed): "interrupted"} and "Traceback" not in done.stderr


SWEEPS = [  # typed, how many arms of it differ
    (["seed=1,2", "model=glob(dit_*)"], 8),
    (["seed=range(1,4)"], 3),
    (["seed=choice(1,2)", "max_steps=range(1,3)"], 4),
    (["++data.threads=0,1", "+trainer.profiler=simple,advanced", "~callbacks.progress"], 4),
    (["seed=1,2", 'callbacks.samples.prompts=["a, b","c"]'], 2),
    (["class_prompt=one, two", "seed=1,2"], 2),
    (["data.crop=centre,random", "seed=0"], 2),
    (["seed=1,1,1"], 1),
    (["callbacks.samples.prompts=[a,b],[a b],[a-b],[a_b]"], 4),
    ([f"shards={'/very/long' * 20}/a,{'/very/long' * 20}/b"], 2),
    (["seed=1,2", "name=x"], 2),
]


def arms_of(typed):
    """The arms of a command line as Hydra's sweeper makes them, without composing any."""
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    arguments = [a for a in named_sweep([quoted(a, True) for a in typed]) if not a.startswith("-")]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(arguments)
        settings = {o.key_or_group: o.value() for o in parsed if o.is_hydra_override()}
        (batch,) = BasicSweeper.split_arguments([o for o in parsed if not o.is_hydra_override()], None)
    fixed = settings["hydra.job.config.override_dirname.exclude_keys"]
    return [Arm(Path(settings["hydra.sweep.dir"]), overrides, list(map(str, fixed))) for overrides in batch]


@pytest.mark.parametrize(("typed", "different"), SWEEPS, ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else "")
def test_two_arms_never_share_a_directory(typed, different):
    directories = [arm.directory for arm in arms_of(["-m", *typed])]
    assert len(set(directories)) == different and len({d.parent for d in directories}) == 1
    assert [arm.directory for arm in arms_of([*typed, "-m"])] == directories, "the same sweep finds its arms again"
    longer = [arm.directory.name for arm in arms_of(["-m", *typed, "batch_size=3"])]
    assert longer == [d.name for d in directories], "an arm is named by what is swept"


@pytest.mark.slow
def test_the_arms_that_hydra_runs_are_those(tmp_path):
    typed = ["task._target_=stub_task.Stub", "name=s", "seed=1,1,2", "~callbacks.progress"]
    for arguments in (["-m", *typed], [*typed[:2], "-m", *typed[2:]]):
        done = here(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    directories = [arm for _, arm in stub_task.CALLS]
    assert directories[:3] == directories[3:] and len(rows(tmp_path / "outputs/s")) == 2
    ours = [arm.directory for arm in arms_of(["-m", *typed])]
    assert [Path("${outputs}") / d.relative_to("outputs") for d in directories[:3]] == ours


@pytest.mark.slow
def test_a_space_that_a_file_describes(tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    space = "hydra: {sweeper: {params: {seed: '1,2', optimizer.lr: 'choice(0.1)'}}}\noutputs: elsewhere\n"
    (tmp_path / "own/experiment/mine.yaml").write_text(f"# @package _global_\n{space}")
    for steps in (3, 9):  # another length of the same sweep goes on in the same arms
        common = ["-m", "experiment=mine", "name=s", f"max_steps={steps}", "task._target_=stub_task.Stub"]
        done = here(*common, "--config-dir", str(tmp_path / "own"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    directories = [arm for _, arm in stub_task.CALLS]
    assert len(set(directories)) == 2 and directories[:2] == directories[2:]
    assert directories[0].parent == Path("elsewhere/s") and directories[0].name.startswith("seed-1-optimizer.lr-0.1-")


@pytest.mark.slow
def test_arms_of_tasks_that_draw_write_into_folders_of_their_own(tmp_path):
    typed = ["-m", "task=objective", "scheduler=cosine,linear", "output=mine"]
    assert here(*typed, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "mine").glob("*/objective.csv"))) == 2


@pytest.mark.slow
def test_a_misspelt_metric_is_refused_before_anything_is_trained(tmp_path):
    common = ["-m", "experiment=quickstart", "debug=fast_dev_run", "seed=1,2"]
    for metric, words in [("val/los", "'val/loss'?"), ("nothing", "There is ")]:
        done = here(*common, f"optimized_metric={metric}", cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = here(*common, "optimized_metric=val/loss", "~callbacks.validation", cwd=tmp_path)
    assert done.returncode == 2 and "val/loss" in done.stderr, "nothing validates there"
    assert not list(tmp_path.glob("outputs/stages/*"))
    done = here("task=evaluate", "checkpoint=nowhere", "optimized_metric=seen/al", cwd=tmp_path)
    assert done.returncode == 2 and "'seen/all'" in done.stderr


@pytest.mark.slow
def test_a_name_that_only_the_first_arm_can_tell_is_wrong(tmp_path):
    check_optimized("mine/score", {"val/loss", "*"})  # a metric of one's own
    done = here(*STUB, "seed=1,2,3", "optimized_metric=val/lost", cwd=tmp_path)
    assert done.returncode == 2 and "'val/loss'?" in done.stderr and len(stub_task.CALLS) == 1
    assert [r["state"] for r in rows(tmp_path / "outputs/s")] == ["finished"]


def test_the_best_arm_by_the_metrics_name_or_the_sweepers_direction():
    found = [{"directory": n, "metrics": {"val/loss": v, "val/psnr": v}} for n, v in (("a", 1.0), ("b", 2.0))]
    assert best_arm(found, "val/loss").endswith(": a") and best_arm(found, "val/psnr").endswith(": b")
    assert best_arm(found, "val/loss", "maximize").endswith(": b")
    assert "no arm" in best_arm(found, "other")


@pytest.mark.slow
def test_what_a_run_measures_is_known_before(tiny_run):
    from hydra import compose, initialize_config_dir

    from ldm.config.root import conf_dir
    from ldm.config.schema import register
    from ldm.tasks.work.stages import Stages

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=["experiment=quickstart", "debug=fast_dev_run", "export=null"])
    known = Stages(config).measured()
    logged = {k for line in (tiny_run / "metrics.jsonl").read_text().splitlines() for k in json.loads(line)}
    scores = json.loads((tiny_run / "evaluation-ema/evaluation.json").read_text())["metrics"]
    assert logged - {"step", "images", "time"} <= known and set(scores) <= known and "autoencoder/val/psnr" in known


@pytest.mark.slow
def test_a_sweep_ends_with_one_table(tmp_path):
    command = [
        "-m",
        "experiment=quickstart",
        "debug=fast_dev_run",
        "logger=none",
        "name=axes",
        "scheduler=cosine,flow,edm",
    ]
    result = ldm(*command, "parameterization=eps", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    found = rows(tmp_path / "outputs/axes")
    states = {r["scheduler"]: r["state"] for r in found}
    assert states == {"cosine": "finished", "flow": "refused", "edm": "finished"}
    assert all(float(r["val/loss"]) > 0 for r in found if r["state"] == "finished")
    refused = next(r for r in found if r["state"] == "refused")
    assert "parameterization=v" in refused["message"]
    assert "refused: " in result.stderr and "Traceback" not in result.stderr
    # The arms share their shards, autoencoder and latents.
    assert len(list((tmp_path / "outputs/stages").glob("autoencoder-*"))) == 1
    assert len(list((tmp_path / "outputs/axes").glob("*/config.yaml"))) == 2
    # The same sweep finds its arms finished.
    again = here(*command, "parameterization=eps", cwd=tmp_path)
    assert again.returncode == 0 and "was finished before" in again.stdout


@pytest.mark.parametrize("sweep", [["-m", "seed=1,2"], []])
@pytest.mark.parametrize(
    ("asked", "said"), [("trainer.num_nodes=2", "torchrun"), ("trainer.strategy=fsdp", "trainer=fsdp")]
)
def test_what_no_arm_can_have_is_said_once(tmp_path, sweep, asked, said):
    result = here("experiment=quickstart", "trainer=ddp", asked, *sweep, cwd=tmp_path)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_name_is_that_of_the_sweep_in_every_task(tmp_path):
    typed = ["-m", "task=prepare", "source=shapes", "source.validation=2", "source.unseen=2", "name=mine"]
    done = here(*typed, "source.count=4,6", "output=shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["state"] for r in rows(tmp_path / "outputs/mine")] == ["finished"] * 2
    assert len(list((tmp_path / "shards").iterdir())) == 2, "each arm has its own"


@pytest.mark.slow
def test_a_sweep_that_does_nothing_is_refused(tmp_path):
    done = here(*STUB, "seed=91", cwd=tmp_path)
    assert done.returncode == 2 and "all 1 arms were refused" in done.stderr
