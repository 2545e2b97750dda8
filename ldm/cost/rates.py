"""How long work takes: on a card by its data sheet, on this machine by timing each of its operations alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ldm.cost.cards import GIGA, Card
from ldm.cost.work import Call, Shape, Size, Work


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
        end = time.monotonic() + limit
        for call in sorted(work.times, key=lambda c: -work.times[c] * _amount(work.sizes[c])):
            if time.monotonic() > end:
                break
            taken = self._time(call)
            if taken is not None:
                self.taken[call] = taken
        self._rate = self._rates(work)
        x, y = torch.ones(2, 2**24, device=device)
        self._move = self._seconds(lambda: x.add_(y)) / (3 * x.nbytes)

    def seconds(self, work: Work) -> float:
        return sum(n * self._of(work, call) for call, n in work.times.items())

    def to_move(self, size: float) -> float:
        return size * self._move

    def _of(self, work: Work, call: Call) -> float:
        size = work.sizes[call]
        return self.taken[call] if call in self.taken else _amount(size) * self._rate[bool(size.flops)]

    def _rates(self, work: Work) -> dict[bool, float]:
        """Seconds for an amount, of calls with FLOPs and of others."""
        amounts, seconds = dict.fromkeys((True, False), 0.0), dict.fromkeys((True, False), 0.0)
        for call, taken in self.taken.items():
            kind = bool(work.sizes[call].flops)
            seconds[kind] += taken
            amounts[kind] += _amount(work.sizes[call])
        return {kind: seconds[kind] / (amounts[kind] or 1.0) for kind in seconds}

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


def _amount(size: Size) -> float:
    """What calls are compared by: a byte moved counts as ten FLOPs."""
    return max(size.flops, 10 * size.bytes)


def _made(spec: Any, device: str) -> Any:
    """Arguments with numbers in them."""
    if isinstance(spec, Shape):
        made = torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device=device)
        return made.normal_() if made.is_floating_point() else made.zero_()
    if isinstance(spec, torch.device):
        return torch.device(device)
    return [_made(value, device) for value in spec] if isinstance(spec, tuple) else spec
