"""All that the processes of a job say to one another.

Short messages go through the store where they meet: what must agree, what the first process made for all, who is still
there. None of that is a collective, and the group for collectives is open only while a run trains (`group`): whatever a
library does in a process that works alone, it cannot wait for the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ldm.errors import ConfigError
from ldm.launch import Launch, OtherProcess, launch
from ldm.training.distributed.meeting import Meeting
from ldm.training.run.directory import differences

TIMEOUT = 1800.0  # seconds; conf/trainer/ddp.yaml
T = TypeVar("T")
_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)

_meeting: Meeting | None = None


@contextmanager
def together(timeout: float = TIMEOUT) -> Iterator[None]:
    """One command, or one arm of a sweep, in all processes. An error of one of them ends it in all."""
    global _meeting
    here = launch()
    if here.world_size == 1:
        yield
        return
    if _meeting is None:
        _meeting = Meeting(here, timeout)
    _meeting.begin()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, OtherProcess) and not hasattr(error, "everywhere"):
            refused = isinstance(error, ConfigError)
            line = str(error) if refused else f"{type(error).__name__}: {error}"
            code = 2 if refused else 130 if isinstance(error, KeyboardInterrupt) else 1
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else code
            _meeting.fail(" ".join(line.split())[:500], code)
        _meeting.end(patience=5)
        raise
    _meeting.end(patience=timeout)


def another_can_follow() -> bool:
    """Whether a sweep's next arm can run: not after an error inside a run's group, in which others may still wait."""
    return met() is None or not dist.is_initialized()


def met() -> Meeting | None:
    """The meeting of this process; None where it is alone."""
    return _meeting if launch().world_size > 1 else None


def speaks(error: BaseException) -> bool:
    """Whether this process is the one of its host that says it: equal errors of all are said once a host."""
    here = launch()
    if here.world_size == 1:
        return True
    if isinstance(error, OtherProcess):
        return not error.told_here and here.local_rank == 0
    if _meeting is None or hasattr(error, "everywhere"):
        return here.local_rank == 0
    try:
        _meeting.raise_failure()
    except OtherProcess as other:  # another was sooner
        return not other.told_here and here.local_rank == 0
    except dist.DistError:  # the store went with another process
        pass
    return True


def agree(facts: Mapping[str, Any], remedy: str) -> None:
    """ConfigError in every process, naming the first key in which two of them differ, both values and both hosts."""
    meeting = met()
    if meeting is None:
        return
    mine = json.loads(json.dumps(facts, default=str))
    first = by_first(lambda: mine)
    found = [change for key in first for change in differences(first[key], mine.get(key), key)]
    for rank, problem in enumerate(meeting.collect("differs", found[:1])):
        if problem:
            key, _, values = problem[0].partition(": ")
            one, _, other = values.partition(" -> ")
            error = ConfigError(
                f"{key} is {one[:200]} in {meeting.places[0]} and {other[:200]} in {meeting.places[rank]}: {remedy}"
            )
            error.everywhere = True  # type: ignore[attr-defined]
            raise error


def by_first(function: Callable[[], T]) -> T:
    """What the first process makes of `function`, in all of them: plain data. The others wait as long as it lives."""
    meeting = met()
    if meeting is None:
        return function()
    key = meeting.next_key("made")
    if meeting.here.first:
        text = json.dumps(function())
        meeting.store.set(key, text)
        return json.loads(text)
    meeting.wait([key], None)
    return json.loads(meeting.store.get(key))


def collected(value: Any) -> list[Any]:
    """Every process's plain data, by rank. For rare cases: it goes through the store."""
    meeting = met()
    return [value] if meeting is None else meeting.collect("told", value)


def arrived() -> None:
    """Notes that this process has come as far as its next meeting with the others: who stays behind is named."""
    if _meeting is not None:
        _meeting.pulse.place += 1


def when_lost(say: Callable[[str], None]) -> None:
    """`say` is told the line before this process ends because another is lost."""
    if _meeting is not None:
        _meeting.pulse.when_lost = say


@contextmanager
def group(backend: str) -> Iterator[None]:
    """The process group for collectives, found by Lightning. After an error it is left to the end of the process."""
    meeting = met()
    here, timeout = (meeting.here, meeting.timeout) if meeting is not None else (Launch(), TIMEOUT)
    store: dist.Store = dist.HashStore()
    if meeting is not None:
        meeting.pulse.enter()
        store = dist.PrefixStore(meeting.next_key("group"), meeting.store.clone())  # type: ignore[attr-defined]
    # The pulse names who is missing before this time is up; the group's own timeout could only say that somebody is.
    patience = timedelta(seconds=2 * timeout + 60)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=patience)
    try:
        yield
    except BaseException as error:
        if meeting is None or hasattr(error, "everywhere"):
            _close(meeting)
        elif _BROKEN.search(str(error)):
            raise meeting.cause(error) from None
        raise
    _close(meeting)


def _close(meeting: Meeting | None) -> None:
    if meeting is not None:  # whoever closes its end first would break the last exchange of the others
        meeting.collect("closes", None)
        meeting.pulse.leave()
    if dist.is_initialized():
        dist.destroy_process_group()
