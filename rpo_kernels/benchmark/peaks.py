"""Measurement of memory: the peak of a training pass beyond its inputs.

On a GPU it is the peak of torch's allocator. On a CPU it is that of the resident set, each implementation in a process
of its own, so that none is affected by another's memory, a limit applies to each, and a crash is recorded as a result.
"""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .allocations import run_step, trace_step
from .clock import free_memory, time_limit
from .implementations.catalogue import find_one
from .implementations.registry import Implementation, Unavailable
from .inputs import Inputs
from .problem import Problem
from .results import Result, failure

# glibc keeps freed blocks below a growing threshold, which would hide later allocations from the resident set.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class PeakSettings(NamedTuple):
    """How to measure."""

    limit: int | None = None  # bytes that inputs and work together may take
    states: str | None = None  # file of hidden states, see `inputs.save_states`
    snapshots: str | None = None  # also trace allocations, and save them for torch's memory visualiser in this folder
    timeout: float = 240  # seconds for one problem
    tree: str | None = None  # another checkout of this package to measure, on a CPU only


def measure_peaks(one: Implementation, problems: list[Problem], settings: PeakSettings) -> list[Result]:
    """Measure an implementation's peak memory on each problem.

    Args:
        problems: with the implementation's source; growing sizes, since one that does not fit rules out larger ones.

    Returns:
        For each problem `status` ("ok", "unavailable", "out of memory" or "failed") and `reason`; if ok, `peak_bytes`
        beyond the inputs and `input_bytes`; if traced, `parts` and `snapshot`.

    Raises:
        DeviceLost: if the GPU is left unusable for this process.
    """
    if reason := one.unavailable_reason(problems[0].device):
        return [{"status": "unavailable", "reason": reason} for _ in problems]
    if problems[0].device != "cpu":
        return [_attempt(one, problem, settings) for problem in problems]
    results: dict[Problem, Result] = {}
    while waiting := [p for p in problems if p not in results]:
        finished = _run_child(one, waiting, settings)
        for problem, result in zip(waiting, finished):
            results[problem] = result
            if result["status"] == "out of memory":
                too_large = {**result, "reason": "a smaller problem was out of memory"}
                results.update({p: too_large for p in waiting if _larger(p, problem) and p not in results})
    return [results[p] for p in problems]


def _larger(a: Problem, b: Problem) -> bool:
    same_kind = a._replace(sequences=b.sequences, length=b.length, vocab=b.vocab) == b
    return same_kind and a.rows >= b.rows and a.vocab >= b.vocab


def _run_child(one: Implementation, problems: list[Problem], settings: PeakSettings) -> list[Result]:
    """Results of the first problems, at least one: the process stops where it runs out of memory."""
    task = json.dumps([one.source, one.name, [p._asdict() for p in problems], settings._asdict()])
    command = [sys.executable, "-c", "from rpo_kernels.benchmark.peaks import child; child()"]
    try:
        done = subprocess.run(
            command, input=task, capture_output=True, text=True, timeout=settings.timeout * len(problems) + 60,
            env={**os.environ, **_MALLOC, **tree_environment(settings.tree)}, cwd=settings.tree,
        )  # fmt: skip
        output, errors, code = done.stdout, done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output, errors, code = text_of(expired.stdout), text_of(expired.stderr), "timed out"
    results = [json.loads(line[2:]) for line in output.splitlines() if line.startswith("> ")]
    stopped = results and results[-1]["status"] == "out of memory"
    if len(results) < len(problems) and not stopped:
        results.append(failure(f"{code}: {errors.strip()[-300:]}"))
    return results


def tree_environment(tree: str | None) -> dict[str, str]:
    """The variables under which a Python process imports this package from another checkout."""
    return {} if tree is None else {"PYTHONPATH": os.pathsep.join([tree, os.environ.get("PYTHONPATH", "")])}


def text_of(output: str | bytes | None) -> str:
    """Output of a process that was stopped."""
    return output if isinstance(output, str) else (output or b"").decode(errors="replace")


@contextmanager
def failures_in(result: Result, device: str, timeout: float) -> Iterator[None]:
    """An exception of the block, or its taking too long, becomes the implementation's result.

    Raises:
        DeviceLost: if the GPU is not usable afterwards.
    """
    try:
        with time_limit(timeout):
            yield
    except Unavailable as reason:
        result.update(status="unavailable", reason=str(reason))
    except Exception as error:
        result.update(failure(f"{type(error).__name__}: {error}"))
    free_memory(device)


def _attempt(one: Implementation, problem: Problem, settings: PeakSettings) -> Result:
    result: Result = {}
    try:
        with failures_in(result, problem.device, settings.timeout):
            result.update(_measure(one, problem, settings))
    finally:
        if settings.limit is not None and problem.device != "cpu":  # on a CPU the limit ends with the process
            torch.cuda.set_per_process_memory_fraction(1.0)
    return result


def child() -> None:
    """The measuring process: a task on standard input, a line of JSON for each problem on standard output."""
    source, name, problems, settings = json.load(sys.stdin)
    for fields in problems:
        torch._dynamo.reset()
        result = _attempt(find_one(source, name), Problem(**fields), PeakSettings(**settings))
        print("> " + json.dumps(result), flush=True)
        if result["status"] == "out of memory":
            return


def _measure(one: Implementation, problem: Problem, settings: PeakSettings) -> dict[str, Any]:
    run = one.load(problem)
    if settings.limit is not None:
        _limit_memory(settings.limit, problem.device)
    inputs = Inputs.make(problem, Path(settings.states) if settings.states else None)
    input_bytes = {name: x.nbytes for name, x in inputs.named.items()}
    run_step(run, inputs)  # compile and warm up
    meter = ResidentSet() if problem.device == "cpu" else _Allocator()
    run_step(run, inputs)
    result: dict[str, Any] = {"status": "ok", "reason": None, "peak_bytes": meter.peak(), "input_bytes": input_bytes}
    if settings.snapshots is not None:
        trace, result["parts"] = trace_step(run, inputs)
        name = re.sub(r"\W+", "-", f"{one.name} {problem.title}".lower()).strip("-") + ".pickle"
        path = Path(settings.snapshots) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(trace))
        result["snapshot"] = path.name
    return result


def _limit_memory(limit: int, device: str) -> None:
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    elif sys.platform == "linux":
        torch.ones(2**20).sum()  # start torch's threads before the limit applies
        resource.setrlimit(resource.RLIMIT_DATA, (_proc_status("VmData") + limit, resource.RLIM_INFINITY))


class ResidentSet:
    """Peak of this process's resident set from now on."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        self._start = _proc_status("VmRSS")

    def peak(self) -> int:
        return max(0, _proc_status("VmHWM") - self._start)


class _Allocator:
    """Peak of torch's GPU allocator from now on."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._start = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._start


def _proc_status(field: str) -> int:
    """Bytes of a field of this process's status; elsewhere than on Linux the peak resident set stands for all."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
