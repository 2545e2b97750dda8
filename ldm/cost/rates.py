"""How long work takes: on a card by its data sheet, on this machine by timing each of its operations alone."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ldm.cost.cards import GIGA, Card
from ldm.cost.work import Call, Shape, Work


@dataclass(frozen=True)
class ByDataSheet:
    """mfu: the share of the peak that products and convolutions reach, everything between them included."""

    card: Card
    half: torch.dtype | None
    mfu: float

    def seconds(self, work: Work) -> float:
        return work.flops / (self.card.peak(self.half) * self.mfu)

    def to_move(self, size: float) -> float:
        """Seconds in which the card's memory reads or writes so many bytes."""
        return size / (self.card.bandwidth * GIGA)


class ByTiming:
    """This machine. What there is no time to try counts as much a byte, or a FLOP, as the calls that were timed.

    work: what will be asked for; its largest calls are timed, for at most `limit` seconds.
    """

    def __init__(self, work: Work, device: str, limit: float = 20.0):
        self.device, self.taken = device, dict[Call, float]()
        self._sizes, end = work.sizes, time.monotonic() + limit
        for call in sorted(work.times, key=lambda c: -work.times[c] * _amount(work, c)):
            if time.monotonic() > end:
                break
            taken = self._time(call)
            if taken is not None:
                self.taken[call] = taken
        self._rate = self._rates()
        x, y = torch.ones(2, 2**24, device=device)
        self._move = self._seconds(lambda: x.add_(y)) / (3 * x.nbytes)

    def seconds(self, work: Work) -> float:
        return sum(n * self._of(work, call) for call, n in work.times.items())

    def to_move(self, size: float) -> float:
        return size * self._move

    def _of(self, work: Work, call: Call) -> float:
        if call in self.taken:
            return self.taken[call]
        return _amount(work, call) * self._rate[bool(work.sizes[call].flops)]

    def _rates(self) -> dict[bool, float]:
        """Seconds for an amount, of calls with FLOPs and of others."""
        amounts, seconds = defaultdict[bool, float](float), defaultdict[bool, float](float)
        work = Work(sizes=self._sizes)
        for call, taken in self.taken.items():
            seconds[bool(self._sizes[call].flops)] += taken
            amounts[bool(self._sizes[call].flops)] += _amount(work, call)
        return defaultdict(float, {kind: seconds[kind] / amounts[kind] for kind in seconds if amounts[kind]})

    def _time(self, call: Call) -> float | None:
        """None for a call that cannot be made with arbitrary numbers."""
        try:
            arguments = _made(call.arguments, self.device)
            named = {name: _made(value, self.device) for name, value in call.named}
            with torch.no_grad():
                return self._seconds(lambda: call.function(*arguments, **named))
        except (RuntimeError, IndexError):
            return None

    def _seconds(self, function: Callable[[], Any]) -> float:
        """The median of a few calls, the first left out."""
        taken = []
        for _ in range(4):
            self._wait()
            start = clock(self.device)
            function()
            self._wait()
            taken.append(clock(self.device) - start)
        return statistics.median(taken[1:])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds. On a CPU those that this process computed for, a thread: what others do there is not its time."""
    return time.perf_counter() if device == "cuda" else time.process_time() / torch.get_num_threads()


def _amount(work: Work, call: Call) -> float:
    """What calls are compared by: a byte moved counts as ten FLOPs."""
    size = work.sizes[call]
    return max(size.flops, 10 * size.bytes)


def _made(spec: Any, device: str) -> Any:
    """Arguments with numbers in them."""
    if isinstance(spec, Shape):
        made = torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device=device)
        return made.normal_() if made.is_floating_point() else made.zero_()
    if isinstance(spec, torch.device):
        return torch.device(device)
    return [_made(value, device) for value in spec] if isinstance(spec, tuple) else spec
