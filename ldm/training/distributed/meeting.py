"""Where the processes of one job meet: a store that carries short messages, and who they are.

It is torchrun's store, or one that rank 0 opens under srun. Nothing here is a collective.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ldm.errors import ConfigError
from ldm.launch import Launch, OtherProcess
from ldm.training.distributed.pulse import EXIT, Place, Pulse

T = TypeVar("T")
REMEDY = "Start as many processes as were announced; trainer.strategy.timeout= is how long is waited."


class Meeting:
    """The store of the processes, and who they are. Keys are used once: all processes count them alike."""

    def __init__(self, here: Launch, timeout: float):
        self.here, self.timeout, self.round, self.count = here, timeout, 0, 0
        self.places: list[Place] = []
        self.store = self._fresh(_store(here, timeout))
        self.places = [Place(*p) for p in self.collect("hello", [here.rank, _host(), here.node, here.local_rank])]
        self.pulse = Pulse(self.store, here.rank, self.places, timeout)

    @property
    def local_size(self) -> int:
        """Processes on this host."""
        return sum(p.node == self.here.node for p in self.places)

    def _fresh(self, store: dist.Store) -> dist.Store:
        """The part of the store that belongs to these processes: torchrun restarts the processes, not the store.

        Every other process calls with a word of its own, and the first answers that word with the part's name.
        """
        mine, rank = uuid.uuid4().hex, self.here.rank
        if not self.here.first:
            store.set(f"call/{rank}", mine)
            name = self._poll(lambda: _after(store, f"answer/{rank}", mine + " "), [0])
            store.set(f"joined/{rank}", f"{name} ")
            return dist.PrefixStore(name, store)
        waiting = set(range(1, self.here.world_size))

        def all_joined() -> bool:
            for other in list(waiting):
                if store.check([f"call/{other}"]):
                    store.set(f"answer/{other}", f"{store.get(f'call/{other}').decode()} {mine}")
                if _after(store, f"joined/{other}", mine) is not None:
                    waiting.discard(other)
            return not waiting

        self._poll(lambda: all_joined() or None, waiting)
        return dist.PrefixStore(mine, store)

    def next_key(self, what: str) -> str:
        self.count += 1
        return f"{self.round}/{self.count}/{what}"

    def collect(self, what: str, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        key = self.next_key(what)
        keys = [f"{key}/{rank}" for rank in range(self.here.world_size)]
        self.store.set(keys[self.here.rank], json.dumps(value, default=str))
        self.wait(keys, self.timeout)
        return [json.loads(v) for v in self.store.multi_get(keys)]

    def wait(self, keys: list[str], timeout: float | None) -> None:
        """Until all keys are there; OtherProcess when somebody failed, ConfigError when somebody did not come."""

        def there() -> bool | None:
            if self.store.check(keys):
                return True
            missing.clear()
            missing.update(int(k.rsplit("/", 1)[1]) for k in keys if timeout and not self.store.check([k]))
            self.raise_failure()
            return None

        missing: set[int] = set()
        self._poll(there, missing, timeout)

    def _poll(self, found: Callable[[], T | None], missing: Collection[int], timeout: float | None = 0) -> T:
        """Asks until there is an answer. missing: the ranks that are waited for, named when the time is up."""
        timeout = self.timeout if timeout == 0 else timeout
        started, pause = time.monotonic(), 0.005
        try:
            while (answer := found()) is None:
                if timeout is not None and time.monotonic() - started > timeout:
                    raise ConfigError(f"{self._named(missing)} did not come within {timeout:g} s. {REMEDY}")
                time.sleep(pause)
                pause = min(2 * pause, 0.25)
        except dist.DistError as error:  # torchrun, or the first process, has gone
            raise OtherProcess(f"the store of this job's processes is gone ({_brief(error)})", EXIT, False) from None
        return answer

    def begin(self) -> None:
        self.round, self.count = self.round + 1, 0
        self.pulse.failure = self._failure_key

    def end(self, patience: float) -> None:
        """The first process leaves last: under srun the store goes with it, before others have read what it wrote."""
        keys = [f"{self.round}/ends/{rank}" for rank in range(self.here.world_size)]
        with suppress(dist.DistError):
            self.store.set(keys[self.here.rank], "")
            started = time.monotonic()
            while self.here.first and not self.store.check(keys) and time.monotonic() - started < patience:
                time.sleep(0.02)

    def fail(self, line: str, exit_code: int) -> None:
        """Tells the others why this process ends. The first to say so is the one who is believed."""
        mine = json.dumps([self.here.rank, line, exit_code])
        self.store.compare_set(self._failure_key, "", mine)

    def raise_failure(self) -> None:
        """OtherProcess where another process has failed in this round."""
        if not self.store.check([self._failure_key]):
            return
        rank, line, code = json.loads(self.store.get(self._failure_key))
        if rank != self.here.rank:
            place = self.places[rank]
            raise OtherProcess(f"{place} ended this job: {line}", code, place.node == self.here.node)

    def cause(self, error: BaseException) -> OtherProcess:
        """Why an exchange with another process broke: what that one says, if it lived to say it."""
        started = time.monotonic()
        try:
            while time.monotonic() - started < 3:
                self.raise_failure()
                time.sleep(0.05)
        except OtherProcess as known:
            return known
        except dist.DistError:
            pass
        return OtherProcess(f"the connection to another process broke, so it has ended ({_brief(error)})", EXIT, False)

    @property
    def _failure_key(self) -> str:
        return f"{self.round}/failed"

    def _named(self, ranks: Collection[int]) -> str:
        return ", ".join(str(self.places[r]) if self.places else f"rank {r}" for r in sorted(ranks)[:8])


def _store(here: Launch, timeout: float) -> dist.Store:
    address, port = _address(here)
    hosts_it = here.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        wait = timedelta(seconds=timeout)
        tcp = dist.TCPStore(address, port, is_master=hosts_it, wait_for_workers=False, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {here.rank} on {_host()} cannot {'open' if hosts_it else 'reach'} the store at {address}:{port} "
            f"({_brief(error)}): MASTER_ADDR and MASTER_PORT say where rank 0 is."
        ) from None
    job = "/".join(os.environ.get(k, "") for k in ("SLURM_JOB_ID", "SLURM_STEP_ID")) if here.by == "srun" else ""
    return dist.PrefixStore(f"ldm/{job}", tcp)


def _address(here: Launch) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT; under srun, where they are not given, the first host and a port of the job's own."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"
    job = int(re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or 0)
    address = env.get("MASTER_ADDR") or (first_host(nodes) if here.by == "srun" else "127.0.0.1")
    return address, int(env.get("MASTER_PORT") or (15_000 + job % 10_000 if here.by == "srun" else 29_500))


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: "gpu[07-09,12],cpu1" begins with gpu07."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes.strip())
    return "".join(part or "" for part in found.groups()) if found else nodes


def _after(store: dist.Store, key: str, start: str) -> str | None:
    """What follows `start` in the value of a key; None while the value is not there or another."""
    value = store.get(key).decode() if store.check([key]) else ""
    return value.removeprefix(start).strip() if value.startswith(start) else None


def _brief(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def _host() -> str:
    return socket.gethostname()
