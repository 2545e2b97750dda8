"""A task is a dataclass of keys and its YAML: one of somebody else's is found, shown, checked and run like ours."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import here
from conf_nodes import composed

from ldm.config.keys import Task
from ldm.config.root import plain
from ldm.config.schema import check_keys_are_read, keys_of, look_in, schema, tasks
from ldm.errors import ConfigError
from ldm.training.run.identity import decisive

PLANS = {"gpu", "gpus", "gpus_per_node", "mfu", "price", "network", "storage", "dataset_images", "verify"}
MODULE = """
from dataclasses import dataclass
from ldm.config.keys import Output, Task, key
from ldm.tasks.train import Train

@dataclass
class Count(Output, Task):
    letters: str = key("abc", "what is counted", holds="text")
    how_often: int = key(1, "how often", least=1, most=3)
    unit: str = key("each", "of what", choices=("each", "all"))
    own_folder = True

    @staticmethod
    def run(config):
        print("into", config.output)
        return {"letters": float(len(config.letters) * config.how_often)}

@dataclass
class Clash(Task):
    max_steps: str = key("many", "not a number")

@dataclass
class Slow(Train):
    slowness: float = key(1.0, "decides what is trained")

def function(config):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes conf/task/NAME.yaml of somebody's; gives the arguments that find it."""
    (tmp_path / "own_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LDM_ALLOW", "own_tasks,no_such")
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)

    def write(**tasks: str) -> str:
        folder = tmp_path / "conf" / "task"
        folder.mkdir(parents=True)
        for name, target in tasks.items():
            (folder / f"{name}.yaml").write_text(f"# Counts letters: slowly.\n_target_: {target}\n")
        return f"--config-dir={folder.parent}"

    yield write
    look_in()


def test_a_task_of_ones_own(own, tmp_path):
    found = own(count="own_tasks.Count")
    shown = here("--help", found, cwd=tmp_path)
    assert "  count             Counts letters\n" in shown.stdout
    shown = here("--help", "task=count", found, cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in shown if line.startswith("  ")][:5] == [
        "letters",
        "how_often",
        "unit",
        "output",
        "outputs",
    ]
    assert "  letters           what is counted [abc]" in shown

    done = here("task=count", "letters=a, b=c %", "how_often=2", "output=x=y", found, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "into x=y\n"), done.stderr
    for typed, said in {
        "how_often=4": "how_often=4: must be from 1 to 3.",
        "unit=none": "unit=none: choose each or all.",
        "prompt=x": "prompt= is not read by task=count, but by task=sample: leave it out.",
    }.items():
        done = here("task=count", typed, found, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr
    done = here("task=sample", "letters=x", found, cwd=tmp_path)
    assert done.returncode == 2 and "letters= is not read by task=sample, but by task=count" in done.stderr
    done = here("task=count", "letters=x", cwd=tmp_path)
    assert done.returncode == 2 and "count: there is no such option" in done.stderr


def test_a_sweep_of_it_gives_every_arm_a_folder(own, tmp_path):
    done = here(
        "-m", "task=count", "how_often=1,2", "output=there", "name=s", own(count="own_tasks.Count"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folders = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("into ")]
    assert len(set(folders)) == 2 and all(f.startswith("there/how-often-") for f in folders)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("own_tasks.Clash", "max_steps= of task=count is str, by default many, and of task=train int, by default 1000"),
        ("os.system", "task=count: its _target_=os.system is not ours: for code of your own, LDM_ALLOW=os."),
        ("own_tasks.function", "task=count: its _target_=own_tasks.function is no dataclass of keys"),
        ("own_tasks.Nothing", "task=count: its _target_=own_tasks.Nothing cannot be imported"),
        ("no_such.Thing", "task=count: its _target_=no_such.Thing is not found (No module named 'no_such')"),
    ],
)
def test_what_is_no_task_is_refused(own, tmp_path, target, said):
    found = own(count=target)
    for arguments in (["--help"], ["experiment=quickstart"]):
        done = here(*arguments, found, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_what_a_training_task_adds_decides_its_runs_and_no_others(own):
    config = plain(composed("experiment=quickstart"))
    before = decisive(config)
    look_in(Path(own(slow="own_tasks.Slow").partition("=")[2]))
    more = {**config, "slowness": 2.0}
    assert decisive(more) == before
    assert decisive({**more, "task": {"_target_": "own_tasks.Slow"}}) == {**before, "slowness": 2}


def test_every_key_says_what_it_is_and_its_default_may_be():
    for name, key in schema().items():
        assert key.about["help"] and key.problem(key.default) is None, name
    assert set(keys_of(tasks()["plan"])) == {*keys_of(tasks()["train"]), "output", *PLANS}
    assert all(set(keys_of(Task)) <= set(keys_of(kind)) for kind in tasks().values())
    assert next(iter(tasks())) == "train"
    with pytest.raises(ConfigError, match="Did you mean 'prompt'"):
        check_keys_are_read("sample", ["promt=x"])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--help", "task=train"], ["task=sample", "max_steps=3"], ["sampler=no"]]
)
def test_help_and_refusals_wait_for_no_library(arguments, tmp_path):
    """torch takes seconds to import."""
    script = f"import sys, ldm.run; ldm.run.run({arguments}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "transformers", "pandas", "wandb"} & set(done.stderr.split("\n")[-2].split())
