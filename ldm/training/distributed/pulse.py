"""Who is still there: each process says so every few seconds, and whoever falls silent or behind ends the job by name.

A collective that one process does not join holds all the others for ever, or until a timeout that names nobody.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

EXIT = 75  # "try again": what is saved is good
GRACE = 10.0  # seconds for a process to find out by itself that another has failed
RUN = 10**12  # places of one training run; more than its meetings


REMEDY = (
    "Stopped: the same command goes on from the last checkpoint. Where one process works alone for longer than that "
    "(pictures, checkpoints), raise trainer.strategy.timeout=SECONDS."
)


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    rank: int
    host: str
    node: int
    local_rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass
class Heard:
    """What was last heard of a process, and when it last changed."""

    beat: str = ""
    place: int = 0
    alive: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)


class Pulse:
    """Two threads: one talks with the store, the other watches that the store answers.

    The first process hears all others, they hear the first: the store carries a few messages a process and second.
    place: counts where all must come together, several times a micro-batch; a process that lives but stays behind the
    others for `timeout` seconds is as good as lost.
    """

    def __init__(self, store: dist.Store, rank: int, places: Sequence[Place], timeout: float):
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.rank, self.places, self.timeout = rank, places, timeout
        self.interval = min(2.0, timeout / 10)
        self.place, self.training = 0, False
        self._last, self._guilty = (0, time.monotonic()), 0
        self.failure = ""  # key under which a process says why it ends
        self.when_lost: Callable[[str], None] | None = None  # told the line before the process ends
        self.answered = time.monotonic()
        self.heard = {p.rank: Heard() for p in places if p.rank != rank and (rank == 0 or p.rank == 0)}
        self._over = threading.Event()
        self._threads = [threading.Thread(target=t, daemon=True, name="pulse") for t in (self._talk, self._watch_store)]
        for thread in self._threads:
            thread.start()
        atexit.register(self._close)

    def _close(self) -> None:
        """Before the interpreter ends: a thread that it ends inside the store's C++ aborts the process (SIGABRT)."""
        self._over.set()
        for thread in self._threads:
            thread.join(self.interval)

    def enter(self) -> None:
        """A training run begins: from here on all go from micro-batch to micro-batch together."""
        self.place = (self.place // RUN + 1) * RUN
        self.training = True

    def leave(self) -> None:
        self.training = False

    def _talk(self) -> None:
        beats, before, failed = 0, time.monotonic(), 0
        try:
            while not self._over.is_set():
                beats += 1
                self.store.set(f"beat/{self.rank}", f"{beats} {self.place}")
                ranks = list(self.heard)
                keys = [f"beat/{r}" for r in ranks]
                found = self.store.multi_get(keys) if self.store.check(keys) else []
                lost = self.store.get("lost").decode() if self.store.check(["lost"]) else ""
                now = self.answered = time.monotonic()
                if now - before > 5 * self.interval + 1:  # it was this process that slept
                    self.heard = {r: Heard() for r in ranks}
                before = now
                for r, text in zip(ranks, found, strict=False):
                    self._hear(self.heard[r], text.decode(), now)
                if line := lost.partition(" ")[2] or self._missing(now):
                    self._end(line, int(lost.partition(" ")[0]) if lost else self._guilty)
                failed = failed + 1 if self.training and self.store.check([self.failure]) else 0
                if failed * self.interval > GRACE:
                    rank, reason, code = json.loads(self.store.get(self.failure))
                    self._end(f"{self.places[rank]} ended this job: {reason}", rank, code, tell=False)
                self._over.wait(self.interval)
        except RuntimeError:  # the store has gone: torchrun, or the process that kept it, has ended
            return

    @staticmethod
    def _hear(heard: Heard, text: str, now: float) -> None:
        if text != heard.beat:
            heard.alive = now
        place = int(text.split()[1])
        if place != heard.place:
            heard.moved = now
        heard.beat, heard.place = text, place

    def _missing(self, now: float) -> str:
        """The line about a process that is silent or behind; "" while all are well."""
        for rank, heard in self.heard.items():
            if now - heard.alive > self.timeout:
                return self._line(rank, "has not been heard of")
        if self.rank == 0 and self.training:
            mine = Heard(place=self.place, moved=self._moved(now))
            everyone = {0: mine, **self.heard}
            front = max(h.place for h in everyone.values())
            for rank, heard in everyone.items():
                lives = now - heard.alive < 3 * self.interval
                if lives and heard.place < front and now - heard.moved > self.timeout:
                    return self._line(rank, "has not come to where the others wait")
        return ""

    def _moved(self, now: float) -> float:
        """When this process last came to another micro-batch."""
        if self._last[0] != self.place:
            self._last = (self.place, now)
        return self._last[1]

    def _line(self, rank: int, what: str) -> str:
        self._guilty = rank
        return f"{self.places[rank]} {what} for {self.timeout:g} s"

    def _watch_store(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if now - before > 5 * self.interval + 1:
                self.answered = now
            before = now
            if now - self.answered > self.timeout:
                line = f"the store of {self.places[0]} has not answered for {self.timeout:g} s"
                self._end(line, 0, tell=False)

    def _end(self, line: str, guilty: int, code: int = EXIT, tell: bool = True) -> None:
        """Says it once a host and ends this process, whose main thread may stand in a collective for ever."""
        if tell and self.rank == 0:
            self.store.set("lost", f"{guilty} {line}")
            time.sleep(2 * self.interval)  # the store may go with this process: the others have heard it by then
        if self.when_lost is not None:
            self.when_lost(line)
        node = self.places[self.rank].node
        speaker = min((p.rank for p in self.places if p.node == node and p.rank != guilty), default=self.rank)
        if self.rank == speaker:
            print(f"error: {line}. {REMEDY if code == EXIT else ''}", file=sys.stderr, flush=True)
        os._exit(code)
