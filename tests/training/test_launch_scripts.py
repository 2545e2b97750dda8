"""The launch scripts of experiments/011, run by bash with SLURM's programs, and python's, replaced by recorders.

torchrun's script is run for real by test_ddp.py.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import ENVIRONMENT, wait_for

SCRIPTS = Path(__file__).parents[2] / "experiments/011_launching"
RECORD = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0") $*" >> "$RECORD"\n'


@pytest.fixture
def programs(tmp_path):
    """(environment, what was called so far); each program ends with the code that `codes` says."""
    folder, record = tmp_path / "programs", tmp_path / "record"
    folder.mkdir()
    record.touch()

    def make(**codes: int):
        for name, code in codes.items():
            (folder / name).write_text(f"{RECORD}exit {code}\n")
            (folder / name).chmod(0o755)
        return {**ENVIRONMENT, "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record)}

    return make, lambda: record.read_text().splitlines(), folder


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75])
def test_a_slurm_job_is_queued_again_after_75_alone(programs, tmp_path, code):
    make, called, _ = programs
    environment = make(srun=code, scontrol=0) | {"SLURM_JOB_ID": "17"}
    asked = ["bash", str(SCRIPTS / "slurm.sbatch"), "experiment=sd_base", "name=two words"]
    assert subprocess.run(asked, env=environment, cwd=tmp_path, check=False).returncode == code
    started = "srun --kill-on-bad-exit=1 python -m ldm.run trainer=ddp experiment=sd_base name=two words"
    assert called() == [started] + ["scontrol requeue 17"] * (code == 75)
    text = (SCRIPTS / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=USR1@" in text and "#SBATCH --requeue" in text


@pytest.mark.parametrize("code", [0, 2, 75])
def test_an_arm_of_an_array_is_a_line(programs, tmp_path, code):
    make, called, _ = programs
    (tmp_path / "arms.txt").write_text("scheduler=cosine\nscheduler=flow 'prompt=two words'\n")
    environment = make(python=code, scontrol=0) | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "5"}
    asked = ["bash", str(SCRIPTS / "slurm_array.sbatch"), "axes", "arms.txt", "experiment=quickstart"]
    assert subprocess.run(asked, env=environment, cwd=tmp_path, check=False).returncode == code
    started = (
        "python -m ldm.run experiment=quickstart scheduler=flow prompt=two words name=axes/arm-2 logger.group=axes"
    )
    assert called() == [started] + ["scontrol requeue 5_2"] * (code == 75)
    beyond = subprocess.run(
        asked, env=environment | {"SLURM_ARRAY_TASK_ID": "3"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert beyond.returncode == 2 and "arms.txt has no line 3: --array=1-2" in beyond.stderr


def test_a_signal_to_the_array_script_reaches_the_arm(programs, tmp_path):
    """Which saves and ends with 75 in its own time: the script waits for it, then queues it again."""
    make, called, folder = programs
    environment = make(scontrol=0) | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "5"}
    (folder / "python").write_text(
        f'{RECORD}trap \'sleep 0.3; echo saved >> "$RECORD"; exit 75\' USR1\ntouch "$RECORD.ready"\n'
        "while true; do sleep 0.05; done\n"
    )
    (folder / "python").chmod(0o755)
    (tmp_path / "arms.txt").write_text("seed=1\n")
    asked = ["bash", str(SCRIPTS / "slurm_array.sbatch"), "axes", "arms.txt"]
    script = subprocess.Popen(asked, env=environment, cwd=tmp_path)
    wait_for((tmp_path / "record.ready").exists, seconds=10)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=10) == 75
    assert called()[1:] == ["saved", "scontrol requeue 5_1"]


def test_the_kubernetes_job_is_torchrun_in_every_pod():
    job = yaml.safe_load((SCRIPTS / "pytorchjob.yaml").read_text())
    assert job["kind"] == "PyTorchJob" and job["spec"]["nprocPerNode"] == "8"
    pods = job["spec"]["pytorchReplicaSpecs"]
    assert pods["Master"]["replicas"] == 1 and pods["Worker"]["replicas"] == 3
    for pod in pods.values():
        assert pod["restartPolicy"] == "OnFailure"
        (container,) = pod["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        assert container["command"] == ["torchrun", "-m", "ldm.run"] and "trainer=ddp" in container["args"]
