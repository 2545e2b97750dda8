"""Several processes of one job, forked from this one: what torchrun or srun would start, in a tenth of the time."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Rank:
    """What became of one process. code: of its exit; value: what the function gave; err: its stderr."""

    code: int | None
    value: Any = None
    err: str = ""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def on_ranks(
    function: Callable[[int], Any],
    world: int = 2,
    environments: Sequence[dict[str, str]] | None = None,  # instead of torchrun's variables
    seconds: float = 120,
    port: int | None = None,
) -> list[Rank]:
    """Runs `function(rank)` in each; whoever is left after `seconds` is killed (code -9)."""
    context, port = multiprocessing.get_context("fork"), port or free_port()
    places, results = [], []
    for rank in range(world):
        own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "GROUP_RANK": 0} if environments is None else {}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environments[rank] if environments else {})}
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(function, rank, own, theirs))
        process.start()
        theirs.close()
        places.append((process, ours))
    for process, pipe in places:
        value, err = None, ""
        with contextlib.suppress(EOFError):
            if pipe.poll(seconds):
                value, err = pipe.recv()
        process.join(3)
        if process.is_alive():
            process.kill()
            process.join()
        results.append(Rank(process.exitcode, value, err))
    return results


def command(*arguments: str, cwd: Path) -> Callable[[int], int]:
    """`python -m ldm.run ...` typed in each process's folder: a `{rank}` in it is the process's number."""

    def typed(rank: int) -> int:
        from ldm.run import run

        folder = Path(str(cwd).replace("{rank}", str(rank)))
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        return run([a.replace("{rank}", str(rank)) for a in arguments])

    return typed


def _child(function: Callable[[int], Any], rank: int, environment: dict[str, Any], pipe: Any) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_")) or n in ("RANK", "WORLD_SIZE")]:
        del os.environ[name]
    os.environ.update({k: str(v) for k, v in environment.items()})
    err = io.StringIO()
    value, code = None, 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            value = function(rank)
            code = value if isinstance(value, int) and function.__name__ == "typed" else 0
        except BaseException as error:
            traceback.print_exc()
            value, code = f"{type(error).__name__}: {error}", 1
    pipe.send((value, err.getvalue()))
    sys.stdout.flush()
    os._exit(code)
