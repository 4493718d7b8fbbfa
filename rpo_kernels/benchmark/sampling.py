"""Measurement of time: one sample of each implementation in turn, each between two runs of the case's references.

A machine that slows down thus slows all of them, and each sample has references of its own. Medians are compared.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .clock import Clock
from .implementations.registry import Pass
from .inputs import Inputs
from .references import Reference

LEAST, MOST = 3, 50  # samples of an implementation


class Sample(NamedTuple):
    """Seconds of one forward and backward pass (the latter where the case has one), of the forward pass alone and, by
    name, of each reference: the mean of one just before and one just after."""

    step_s: float
    forward_s: float
    reference_s: dict[str, float]


class SampleError(Exception):
    """An implementation failed while it was timed: its name and the message."""


class Sampler:
    """Takes samples of one implementation."""

    def __init__(self, one: Pass, inputs: Inputs, references: dict[str, Reference], inplace: bool) -> None:
        self._one, self._inputs, self._references, self._inplace = one, inputs, references, inplace
        self._clock = Clock(inputs.problem.device)

    def __call__(self) -> Sample:
        with preserved(self._inputs, self._inplace):
            before = self._time_references()
            step, forward = self._time_step()
            after = self._time_references()
        return Sample(step, forward, {name: (before[name] + after[name]) / 2 for name in before})

    def _time_step(self) -> tuple[float, float]:
        """Seconds of the whole and of its forward pass; their results are freed before the references run again."""
        forward, outcome = self._clock.time(lambda: self._one.forward(self._inputs))
        if not self._inputs.leaves:
            return forward, forward
        backward, _ = self._clock.time(lambda: self._one.backward(self._inputs, outcome))
        return forward + backward, forward

    def _time_references(self) -> dict[str, float]:
        return {name: self._clock.time(reference.run)[0] for name, reference in self._references.items()}


@contextmanager
def preserved(inputs: Inputs, inplace: bool) -> Iterator[None]:
    """Restore the logits after an implementation that overwrites them."""
    pristine = inputs.logits.detach().clone() if inplace else None
    try:
        yield
    finally:
        if pristine is not None:
            inputs.logits.data.copy_(pristine)


def interleave(samplers: dict[str, Callable[[], Sample]], seconds: float, samples: dict[str, list[Sample]]) -> None:
    """Add samples by implementation to `samples`, taken in rounds of one sample each: at least 3, at most 50, and as
    many as fit in an equal share of `seconds`. A slow one leaves after three rounds, and the others go on.

    Raises:
        SampleError: naming the implementation that failed.
    """
    samples.update({name: [] for name in samplers})
    spent = dict.fromkeys(samplers, 0.0)
    share = seconds / max(1, len(samplers))
    while waiting := [name for name in samplers if _wants_more(len(samples[name]), spent[name], share)]:
        for name in waiting:
            start = time.perf_counter()
            try:
                samples[name].append(samplers[name]())
            except Exception as error:
                raise SampleError(name, f"{type(error).__name__}: {error}") from error
            spent[name] += time.perf_counter() - start


def _wants_more(count: int, spent: float, share: float) -> bool:
    return count < LEAST or (count < MOST and spent < share)


def columns(samples: list[Sample]) -> dict[str, object]:
    """Samples as lists by field, as they are saved."""
    names = samples[0].reference_s if samples else {}
    return {
        "step_s": [s.step_s for s in samples],
        "forward_s": [s.forward_s for s in samples],
        "reference_s": {name: [s.reference_s[name] for s in samples] for name in names},
    }
