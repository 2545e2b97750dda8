"""What several processes say to one another: who they are, what must agree, who works alone, who is lost."""

import csv
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import command, free_port, on_ranks
from tiny_training import TINY, make_data

from ldm.errors import ConfigError
from ldm.launch import Launch, expect_srun, launch
from ldm.training.distributed import collectives, processes
from ldm.training.distributed.meeting import first_host
from ldm.training.randomness import Draws
from ldm.training.totals import Totals, binned

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(3, 4, 1, 1, "torchrun")),
        (SRUN, Launch(3, 4, 1, 1, "srun")),
        (SRUN | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "2"}, Launch(0, 2, 1, 1, "torchrun")),  # srun torchrun
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, Launch(3, 4, 1, 1, "srun")),  # typed in a shell of salloc
        (BATCH, Launch()),  # sbatch: its script, a notebook that it starts
        (BATCH | {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),  # that shell itself
    ],
)
def test_who_this_is(monkeypatch, environment, expected):
    for name in [n for n in os.environ if n.startswith("SLURM_")] + list(TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch() == expected


@pytest.mark.parametrize(
    ("environment", "tasks"),
    [
        (BATCH, 4),  # tasks of srun where SLURM's steps are not known, or a script: which of them, waiting tells
        (BATCH | {"SLURM_PROCID": "3"}, 4),
        (BATCH | {"SLURM_NTASKS": "1"}, 1),
        (BATCH | {"SLURM_JOB_NAME": "interactive"}, 1),
        (BATCH | TORCHRUN, 4),
        ({}, 1),
    ],
)
def test_who_asks_for_several_in_a_slurm_job_gets_its_tasks(monkeypatch, capsys, environment, tasks):
    for name in [n for n in os.environ if n.startswith("SLURM_")] + list(TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # so that it is taken away afterwards
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expect_srun()
    assert launch().world_size == tasks
    assert ("begins with srun" in capsys.readouterr().err) == (environment == BATCH)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("a1,b2", "a1"), ("one", "one"), ("rack[3]-ib", "rack3-ib"), ("n[1,3]", "n1")],
)
def test_first_of_slurms_hosts(nodes, host):
    assert first_host(nodes) == host


def test_what_differs_is_named_in_every_process():
    def ask(rank):
        with processes.together(20):
            processes.agree({"same": 1, "data": {"seed": rank % 2}}, "type the same.")

    for rank in on_ranks(ask, world=3):
        assert "data.seed is 0 in rank 0 on" in rank.value and "1 in rank 1 on" in rank.value, rank
        assert rank.value.endswith("type the same.")


def test_an_error_of_one_ends_all():
    def fail(rank):
        with processes.together(20):
            if rank == 1:
                raise ConfigError("no such picture")
            return processes.by_first(lambda: time.sleep(1)), processes.agree({}, "")

    first, second = on_ranks(fail)
    assert second.value == "ConfigError: no such picture"
    assert "rank 1 on" in first.value and first.value.endswith("ended this job: no such picture")

    def fail_alone(rank):
        with processes.together(20):
            return processes.by_first(lambda: 1 / 0)

    first, second = on_ranks(fail_alone)
    assert "ZeroDivisionError" in first.value and "ended this job: ZeroDivisionError" in second.value


def test_the_first_makes_it_while_others_wait_longer_than_the_timeout():
    def make(rank):
        with processes.together(1.0):
            made = processes.by_first(lambda: time.sleep(2.5) or {"made by": rank})
        return made, dist.is_initialized()  # no group is open: nothing that the first calls can wait for the others

    assert [r.value for r in on_ranks(make)] == [({"made by": 0}, False)] * 2


def test_who_does_not_come_is_named():
    def come(rank):
        if rank == 0:
            with processes.together(1.0):
                pass

    first, _ = on_ranks(come)
    assert "rank 1 did not come within 1 s" in first.value


@pytest.mark.parametrize("backend", ["cuda:gloo", "gloo"])  # the first has nothing for CPU tensors, as NCCL has not
def test_nothing_of_ours_reduces_where_there_is_no_cpu_backend(backend):
    def reduce(rank):
        with processes.together(20), processes.group(backend):
            refused = False
            try:
                dist.all_reduce(torch.zeros(1))
            except RuntimeError:
                refused = True
            totals = Totals(["loss", *binned("by_t")])
            totals.add("loss", torch.tensor([1.0, 2.0]) + 10 * rank)
            totals.add_by_bin("by_t", torch.tensor([1.0]), torch.tensor([0.25]))
            totals.reduce()
            rows = torch.tensor([[rank], [7]], dtype=torch.uint8)
            joined = collectives.joined(rows, 2 * rank, 3).flatten().tolist()
            return refused, totals.means(), collectives.highest(rank + 5), joined

    for rank in on_ranks(reduce):
        assert rank.value == (backend != "gloo", {"loss": 6.5, "by_t/2": 1.0}, 6, [0, 7, 1]), rank


def test_a_tensor_where_training_computes_is_summed_over_its_own_group():
    """In place, and by the default group, whose backend knows the device; one process keeps its numbers."""
    values = torch.tensor([[1.0, 2.0]])
    collectives.total_on_device(values)
    assert values.tolist() == [[1, 2]]

    def add(rank):
        with processes.together(20), processes.group("gloo"):
            values = torch.tensor([[1.0, 2.0]]) + 10 * rank
            collectives.total_on_device(values)
            return values.tolist(), collectives._host is None

    assert [r.value for r in on_ranks(add)] == 2 * [([[12, 14]], True)]


def test_sums_are_the_same_whenever_they_are_read():
    def read(rank):
        values = torch.Generator().manual_seed(rank)
        with processes.together(20), processes.group("gloo"):
            often, once = Totals(["loss"]), Totals(["loss"])
            for _ in range(20):
                losses = torch.rand(3, generator=values)
                for totals in (often, once):
                    totals.add("loss", losses)
                    totals.end_step()
                often.reduce()
            return once.reduce().shape, torch.equal(once.values, often.values), once.values[0, 2].item()

    for rank in on_ranks(read):
        assert rank.value == ((21, 1, 3), True, 120.0), rank


@pytest.mark.slow
def test_processes_started_again_meet_again():
    """torchrun keeps its store when it starts the processes again: what was in it is not taken for news."""
    port = free_port()
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    places = [{"TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": str(r), "WORLD_SIZE": "2"} for r in range(2)]

    def meet(rank):
        with processes.together(20), processes.group("gloo"):
            total = torch.tensor([float(rank)])
            collectives.total(total)
            if rank == 1 and os.environ.get("DIE"):
                os.kill(os.getpid(), signal.SIGKILL)
            collectives.highest(1)
            return processes.by_first(os.getpid), total.item()

    died, _ = on_ranks(meet, environments=[p | {"DIE": "1"} for p in places], port=port)
    assert "the connection to another process broke" in died.value
    first, second = on_ranks(meet, environments=places, port=port)
    assert first.value == second.value and first.value[1] == 1.0
    del kept


@pytest.mark.slow
def test_a_stopped_process_is_named(tmp_path):
    def stop(rank):
        with processes.together(1.5), processes.group("gloo"):
            processes.when_lost((tmp_path / "line").write_text)
            for i in range(1000):
                if rank == 1 and i == 3:
                    os.kill(os.getpid(), signal.SIGSTOP)
                collectives.highest(1)

    first, second = on_ranks(stop, seconds=8)
    assert first.code == 75 and second.code == -9
    assert (tmp_path / "line").read_text().endswith("has not been heard of for 1.5 s")


def test_a_process_that_stays_behind_is_named(tmp_path):
    def stay(rank):
        with processes.together(1.5), processes.group("gloo"):
            processes.when_lost(lambda line: (tmp_path / str(rank)).write_text(line))
            for i in range(1000):
                if rank == 1 and i == 3:
                    time.sleep(30)
                collectives.highest(1)

    first, second = on_ranks(stay, seconds=20)
    assert first.code == second.code == 75
    line = (tmp_path / "0").read_text()
    assert line.startswith("rank 1 on ") and "has not come to where the others wait for 1.5 s" in line
    assert (tmp_path / "1").read_text() == line


def test_layers_draw_by_the_place_in_the_step():
    one = Draws(seed=3, batch_size=4, accumulate=4)
    two = [Draws(seed=3, batch_size=4, accumulate=2, rank=r, world_size=2) for r in range(2)]

    def drawn(draws, micro):
        draws.reseed_layers(7, micro)
        return torch.rand(5)

    whole = [drawn(one, k) for k in range(4)]
    parts = [drawn(two[r], k) for k in range(2) for r in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.slow
def test_other_hosts_commands_and_folders_are_refused(tmp_path):
    hosts = [{"RANK": str(r), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": str(r)} for r in range(2)]
    typed = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy.timeout=20", "shards=nowhere", "name=x")
    for rank in on_ranks(command(*typed, cwd=tmp_path / "{rank}"), environments=hosts):
        assert rank.code == 2 and rank.err.count("\n") == 1 and "outputs is " in rank.err, rank
    for rank in on_ranks(command(*typed, "optimizer.lr=0.{rank}1", cwd=tmp_path), environments=hosts):
        assert rank.code == 2 and rank.err.count("\n") == 1, rank
        assert "optimizer.lr is 0.01 in rank 0 on" in rank.err and "0.11 in rank 1 on" in rank.err


def test_other_tasks_are_done_once(tmp_path):
    typed = command("task=prepare", "source=shapes", "source.count=8", "output=shards", cwd=tmp_path)
    assert [r.code for r in on_ranks(typed)] == [0, 0]
    assert (tmp_path / "shards").is_dir()


@pytest.mark.slow
def test_an_arm_that_the_first_process_refuses_is_a_row_and_the_next_runs(tmp_path):
    _, _, latents = make_data(tmp_path)
    typed = ["-m", *TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy.timeout=20", "max_steps=1"]
    typed += [f"shards={latents}", "name=s", "adopt=false", f"checkpoint={tmp_path}/nowhere,null"]
    ranks = on_ranks(command(*typed, cwd=tmp_path))
    assert [r.code for r in ranks] == [0, 0], ranks
    found = list(csv.DictReader((tmp_path / "outputs/s/results.csv").open()))
    assert [r["state"] for r in found] == ["refused", "finished"], found
