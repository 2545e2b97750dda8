"""Several processes against one: losses, scores and wall time, and what becomes of jobs in which something is wrong.

python experiments/008_processes/run.py [FOLDER]    as root: hosts are network namespaces (iproute2)
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HOSTS = ("ldm-a", "ldm-b")
QUICK = ("experiment=quickstart", "debug=fast_dev_run", "logger=none", "max_steps=12", "eval_images=16")
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy.timeout=20")
LONG = ("max_steps=100000", "lr_scheduler=constant", "callbacks.validation=null", "callbacks.jump_to_x0=null")
LONG += ("callbacks.samples=null", "callbacks.checkpoints.every_n_steps=5")
PORT = iter(range(29_700, 29_800))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}


def make_hosts() -> None:
    """Two namespaces with a wire between them."""
    remove_hosts()
    for host in HOSTS:
        _ip("netns", "add", host)
    _ip("link", "add", "ldm-va", "netns", HOSTS[0], "type", "veth", "peer", "name", "ldm-vb", "netns", HOSTS[1])
    for host, device, address in zip(HOSTS, ("ldm-va", "ldm-vb"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
        _ip("-n", host, "addr", "add", address, "dev", device)
        for up in (device, "lo"):
            _ip("-n", host, "link", "set", up, "up")


def remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def torchrun(
    folder: Path,
    arguments: Sequence[str],
    ranks: Sequence[int],
    *more: str,
    own: Callable[[int], Sequence[str]] = lambda _: (),
    mounts: Sequence[tuple[Path, Path]] = (),
) -> list[subprocess.Popen]:
    """One torchrun a host, ranks[i] processes on host i; own(i): what host i is given besides.

    mounts[i]: (folder, place) that host i sees there.
    """
    port, started = next(PORT), []
    for host, n in enumerate(ranks):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *more]
        environment, inside = dict(ENVIRONMENT), []
        if len(ranks) > 1:
            command += [f"--nnodes={len(ranks)}", f"--node_rank={host}", "--master_addr=10.77.0.1"]
            inside = ["ip", "netns", "exec", HOSTS[host]]
            if mounts:
                source, place = mounts[host]
                inside += ["sh", "-c", f'mount --bind "{source}" "{place}" && exec "$@"', "sh"]
            environment["GLOO_SOCKET_IFNAME"] = ("ldm-va", "ldm-vb")[host]
        command += [f"--master_port={port}", "-m", "ldm.run", *arguments, *own(host)]
        log = (folder / f"host-{host}.log").open("w")
        started.append(
            subprocess.Popen(
                [*inside, *command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        )
    return started


def wait(processes: Sequence[subprocess.Popen], seconds: float = 240) -> str:
    """Exit codes, or "hangs"."""
    until = time.monotonic() + seconds
    codes = []
    for process in processes:
        try:
            codes.append(str(process.wait(max(0.1, until - time.monotonic()))))
        except subprocess.TimeoutExpired:
            codes.append("hangs")
            process.terminate()
    return "/".join(codes)


def scalars(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(r["step"], k): v for r in rows for k, v in r.items() if k not in ("time", "train/images_per_second")}


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "evaluation-ema/evaluation.json").read_text())["metrics"]


def furthest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(abs((a[k] or 0) - (b[k] or 0)) for k in a)


def lines(folder: Path) -> str:
    """The lines that the job said of its end, each once."""
    said = [ln for p in sorted(folder.glob("host-*.log")) for ln in p.read_text(errors="replace").splitlines()]
    return " | ".join(dict.fromkeys(ln for ln in said if ln.startswith(("error: ", "stopped"))))[:300]


def workers(folder: Path) -> list[int]:
    """Process ids of this case's ranks, by rank: their working directory is the folder's."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(place / "cwd") == str(folder):
                environment = (place / "environ").read_bytes().split(b"\0")
                ranks = [e for e in environment if e.startswith(b"RANK=")]
                if ranks and b"ldm.run" in (place / "cmdline").read_bytes():
                    found[int(ranks[0][5:])] = int(place.name)
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


def when_training(folder: Path, steps: int = 7) -> None:
    file, until = folder / "outputs/run/metrics.jsonl", time.monotonic() + 120
    while not (file.is_file() and file.read_text().count("\n") > steps) and time.monotonic() < until:
        time.sleep(0.2)


def emptied(root: Path, name: str) -> Path:
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).mkdir(parents=True)
    return root / name


def write(table: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for r in table for k in r)))
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    make_hosts()
    table = []

    def row(case: str, started: float, codes: str, folder: Path, **more: object) -> None:
        seconds = round(time.time() - started, 1)
        table.append({"case": case, "exit": codes, "seconds": seconds, **more, "said": lines(folder)})
        print(table[-1], flush=True)

    fresh = partial(emptied, root)
    ones = {}
    for accumulate in (2, 4):
        folder, started = fresh(f"one-{accumulate}"), time.time()
        one = [sys.executable, "-m", "ldm.run", *QUICK, f"accumulate={accumulate}", "name=run"]
        code = subprocess.run(one, cwd=folder, env=ENVIRONMENT, capture_output=True, check=False).returncode
        ones[accumulate] = folder / "outputs/run", time.time() - started
        row(f"one process accumulating {accumulate}", started, str(code), folder)
    sizes = {"1 host x 2": [2], "2 hosts x 1": [1, 1], "2 hosts x 2": [2, 2], "2 and 1 on two hosts": [2, 1]}
    for case, ranks in sizes.items():
        folder, started = fresh(case.replace(" ", "-")), time.time()
        codes = wait(torchrun(folder, [*QUICK, *DDP, "name=run"], ranks))
        alone, seconds = ones.get(sum(ranks), (None, 0.0))
        more: dict[str, object] = {}
        if alone is not None and set(codes.split("/")) == {"0"}:
            more["losses differ by"] = furthest(scalars(alone), scalars(folder / "outputs/run"))
            more["scores differ by"] = furthest(scores(alone), scores(folder / "outputs/run"))
            more["times one process"] = round((time.time() - started) / seconds, 2)
        row(case, started, codes, folder, **more)
    latents = next((ones[2][0].parent / "stages").glob("latents-*"))
    tiny = ["model=unet_tiny", "text_encoder=small_tiny", "autoencoder=kl_tiny", "batch_size=2", "logger=none"]
    tiny += ["name=run", *DDP, *LONG, "callbacks.losses.every_n_steps=1"]
    data = [f"shards={latents}"]

    def bad(case: str, ranks: Sequence[int], *arguments: str, **own: Any) -> None:
        folder, started = fresh(case.replace(" ", "-")), time.time()
        row(case, started, wait(torchrun(folder, [*tiny, *arguments], ranks, **own)), folder)

    bad("folders are not shared", [1, 1], *data, own=lambda host: [f"outputs=outputs-{host}"])
    other = fresh("other") / "latents"
    shutil.copytree(latents, other)
    shutil.rmtree(other / "train")
    shutil.copytree(other / "val", other / "train")
    bad("other configuration", [1, 1], *data, own=lambda host: [f"optimizer.lr={1 + host}e-4"])
    (root / "data").mkdir(exist_ok=True)
    # `ip netns exec` gives each host mounts of its own: the same path, other samples.
    bad("other data", [1, 1], f"shards={root / 'data'}", mounts=[(latents, root / "data"), (other, root / "data")])
    sent = {
        "a stopped rank": signal.SIGSTOP,
        "SIGTERM to torchrun": signal.SIGTERM,
        "Ctrl-C to torchrun": signal.SIGINT,
    }
    for case, number in sent.items():
        folder = fresh(case.replace(" ", "-"))
        jobs = torchrun(folder, [*tiny, *data], [2])
        when_training(folder)
        started = time.time()
        victims = workers(folder)
        os.kill(victims[1] if number == signal.SIGSTOP and len(victims) > 1 else jobs[0].pid, number)
        codes, status = wait(jobs), json.loads((folder / "outputs/run/status.json").read_text())
        row(case, started, codes, folder, status=f"{status['state']} at {status['step']}")
    folder = fresh("killed")
    jobs = torchrun(folder, [*tiny, *data, "max_steps=40"], [2], "--max-restarts=2")
    when_training(folder)
    started = time.time()
    os.kill(workers(folder)[1], signal.SIGKILL)
    codes = wait(jobs)
    undisturbed = fresh("undisturbed")
    wait(torchrun(undisturbed, [*tiny, *data, "max_steps=40"], [2]))
    differ = furthest(scalars(undisturbed / "outputs/run"), scalars(folder / "outputs/run"))
    row("a killed rank, --max-restarts=2", started, codes, folder, **{"losses differ by": differ})
    remove_hosts()
    write(table, HERE / "results.csv")


if __name__ == "__main__":
    main()
