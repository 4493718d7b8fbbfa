"""How time is measured, and the speed of the machine that it is compared with.

On a GPU: events on the stream, the L2 cache flushed before each sample. On a CPU: the wall clock. Providers take turns
sample by sample, so that a machine that slows down slows them all.
"""

import functools
import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .problem import Inputs, Problem
from .providers import Run

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_FLUSH_BYTES = 2**28  # several times the largest L2


class Samples(NamedTuple):
    """Seconds of each sample. `evaluation_s`: logits or hidden states to loss, no gradients. `forward_s` and
    `backward_s`: the two halves of the same training pass; providers differ in which half they do the work."""

    evaluation_s: list[float]
    forward_s: list[float]
    backward_s: list[float]


class SampleError(Exception):
    """A provider failed while it was timed: its name and the message."""


class Clock:
    """Time between marks on a device: events on an accelerator, the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def flush(self) -> None:
        if self._flush is not None:
            self._flush.zero_()

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        if not self.on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def interleave(runs: dict[str, Run], inputs: Inputs, inplace: set[str], seconds: float) -> dict[str, Samples]:
    """Samples by provider: rounds of one sample each until `seconds` have passed, at least 3, at most 50.

    `inplace` names the providers that overwrite the logits; these are restored, untimed, after each of their samples.

    Raises:
        SampleError: naming the provider that failed.
    """
    clock = Clock(inputs.problem.device)
    samples = {name: Samples([], [], []) for name in runs}
    start, rounds = time.perf_counter(), 0
    while runs and (rounds < 3 or (rounds < 50 and time.perf_counter() - start < seconds)):
        for name, run in runs.items():
            try:
                with preserved(inputs, name in inplace):
                    _sample(run, inputs, clock, samples[name])
            except Exception as error:
                raise SampleError(name, f"{type(error).__name__}: {error}") from error
        rounds += 1
    return samples


@contextmanager
def preserved(inputs: Inputs, inplace: bool) -> Iterator[None]:
    """Give the logits their values back after a provider that overwrites them."""
    pristine = inputs.logits.detach().clone() if inplace else None
    try:
        yield
    finally:
        if pristine is not None:
            inputs.logits.data.copy_(pristine)


def warm_up(run: Run, inputs: Inputs, inplace: bool) -> None:
    """Evaluation and training pass once each: both are compiled, for these sizes."""
    with preserved(inputs, inplace):
        _sample(run, inputs, Clock(inputs.problem.device), Samples([], [], []))


def _sample(run: Run, inputs: Inputs, clock: Clock, samples: Samples) -> None:
    clock.flush()
    start = clock.mark()
    with torch.no_grad():
        run(inputs)
    samples.evaluation_s.append(clock.seconds(start, clock.mark()))
    clock.flush()
    start = clock.mark()
    loss, _ = run(inputs)
    middle = clock.mark()
    torch.autograd.grad(loss, list(inputs.leaves.values()))
    end = clock.mark()
    samples.backward_s.append(clock.seconds(middle, end))
    samples.forward_s.append(clock.seconds(start, middle))


def measure_bandwidth(device: str) -> dict[str, float]:
    """Bytes a second of copying (bytes read and written both counted) and of reading; best of several."""
    source = torch.ones(_COPY_BYTES.get(device, 2**30) // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    copy = min(_repeat(lambda: target.copy_(source), device, 12))
    read = min(_repeat(lambda: source.sum(), device, 12))
    return {"copy": 2 * size / copy, "read": size / read}


def measure_gemm(problem: Problem) -> tuple[str, list[float]]:
    """One head GEMM `[rows, H] x [H, V]` in the dtype that is faster here, the problem's or float32: dtype, seconds."""
    timed = {}
    for dtype in {problem.dtype, "float32"} if problem.device == "cpu" else {problem.dtype}:
        options: dict = dict(dtype=getattr(torch, dtype), device=problem.device)
        hidden = torch.randn(problem.rows, problem.hidden, **options)
        weight = torch.randn(problem.vocab, problem.hidden, **options)
        timed[dtype] = _repeat(functools.partial(torch.mm, hidden, weight.T), problem.device, 5)
    return min(timed.items(), key=lambda item: median(item[1]))


def _repeat(function: Callable, device: str, count: int) -> list[float]:
    clock, samples = Clock(device), []
    for _ in range(count + 1):
        clock.flush()
        start = clock.mark()
        function()
        samples.append(clock.seconds(start, clock.mark()))
    return samples[1:]


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(samples) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer (compilation that does not end)."""

    def expire(*_):
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
    """Give unused memory back.

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
