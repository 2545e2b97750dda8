"""A thread that writes while training goes on, and copies of what it writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Background:
    """Does what it is handed, one after another, in a thread; nothing more once something has failed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, act: Callable[[], None]) -> None:
        before = self._last

        def then() -> None:
            if before is not None:
                before.result()  # raises what has failed, so that a new checkpoint's failure deletes no old one
            act()

        self._last = self._thread.submit(then)

    def check(self) -> None:
        """Raises what has failed, without waiting."""
        if self._last is not None and self._last.done():
            self._last.result()

    def wait(self) -> None:
        """Until all is done. Raises what has failed."""
        if self._last is not None:
            self._last.result()


class Copies:
    """Copies of tensors on the host, in memory that is kept for the next ones: pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """The copy; of a GPU's tensor it is good after `wait`, and nothing that the GPU does later is in it."""
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._held[name] = held
        held.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if tensor.is_cuda:
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))
        return held

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
