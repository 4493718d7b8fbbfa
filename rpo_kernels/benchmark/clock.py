"""Timing on a device, and release of its memory."""

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FLUSH_BYTES = 2**28  # several times the largest L2


class Clock:
    """Time between marks on a device: events on an accelerator, the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def flush(self) -> None:
        """Empty a GPU's L2 cache."""
        if self._flush is not None:
            self._flush.zero_()

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def time(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that a call takes, and what it returns."""
        self.flush()
        start = self.mark()
        result = function()
        return self.seconds(start, self.mark()), result


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer (compilation that does not end)."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class DeviceLost(Exception):
    """After an illegal access every further call to the GPU fails, whoever makes it."""


def free_memory(device: str) -> None:
    """Release unused memory.

    Raises:
        DeviceLost: if the GPU is not usable any more.
    """
    gc.collect()
    if device != "cpu":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error
