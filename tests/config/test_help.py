"""--help, of everything, of one task, of one group: every name that can be typed, one line each."""

import pytest
from commands import here
from conf_nodes import CONF, options

from ldm.config.help import said_of
from ldm.config.schema import group_names, keys_of, tasks


def lines(*arguments, cwd):
    done = here("--help", *arguments, cwd=cwd)
    assert done.returncode == 0 and not done.stderr
    return done.stdout.splitlines()


def test_everything_fits_on_a_screen_or_two(tmp_path):
    shown = lines(cwd=tmp_path)
    first = [line.split()[0] for line in shown if line.startswith("  ")]
    assert len(shown) <= 70 and set(tasks()) <= set(first)
    assert set(group_names()) - {"task"} <= set(first)


@pytest.mark.parametrize("task", tasks())
def test_a_task_shows_the_keys_that_it_reads_and_no_others(task, tmp_path):
    shown = lines(f"task={task}", cwd=tmp_path)
    assert shown[0] == f"task={task}: {said_of(CONF / 'task' / f'{task}.yaml')}"
    named = {line.split()[0] for line in shown if line.startswith("  ")}
    assert named == set(keys_of(tasks()[task]))
    assert lines(task, cwd=tmp_path) == shown


@pytest.mark.parametrize("group", ["sampler", "scheduler", "experiment", "loss"])
def test_a_group_shows_every_option_with_what_it_is(group, tmp_path):
    shown = [line.split(maxsplit=1) for line in lines(group, cwd=tmp_path) if line.startswith("  ")]
    assert [words[0] for words in shown] == [f"{group}={o}" for o in options(group)]
    assert all(len(words) == 2 and "@package" not in words[1] for words in shown)


@pytest.mark.parametrize(("asked", "meant"), [("samplr", "sampler"), ("task=sampel", "task=sample")])
def test_what_there_is_not_is_refused(asked, meant, tmp_path):
    done = here("--help", asked, cwd=tmp_path)
    assert done.returncode == 2 and f"Did you mean '{meant}'?" in done.stderr and done.stderr.count("\n") == 1
