"""How memory is measured: the peak of a training pass beyond its inputs.

On a GPU it is the peak of torch's allocator. On a CPU it is that of the resident set, each provider in a process of its
own, so that none sees another's leftovers, a limit stops one that asks for too much, and a crash is a result. A trace
of every allocation tells what the peak was made of.
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
from typing import Any

import torch

from .problem import Inputs, Problem
from .providers import Provider, Run, Unavailable, providers
from .timing import free_memory, time_limit

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate|cannot allocate|not enough memory|bad_alloc|MemoryError")
# glibc keeps freed blocks below a threshold that grows as it runs, which would hide what is allocated a second time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_peaks(
    provider: Provider, problems: list[Problem], limit: int | None, snapshots: Path | None = None, timeout: float = 240
) -> list[dict[str, Any]]:
    """Measure a provider's peak memory on each problem.

    Args:
        problems: all of the provider's level; growing sizes, since one that does not fit rules out larger ones.
        limit: bytes that inputs and work together may take; None for no limit.
        snapshots: also trace allocations and save snapshots for torch's memory visualiser in this folder.
        timeout: seconds for one problem.

    Returns:
        For each problem `status` ("ok", "unavailable", "out of memory" or "failed") and `reason`; if ok, `peak_bytes`
        beyond the inputs and `input_bytes`; if traced, `parts` and `snapshot`.

    Raises:
        DeviceLost: if a provider left the GPU unusable for this process.
    """
    if reason := provider.unavailable_reason(problems[0].device):
        return [{"status": "unavailable", "reason": reason} for _ in problems]
    if problems[0].device != "cpu":
        return [_attempt(provider, problem, limit, snapshots, timeout) for problem in problems]
    results: dict[Problem, dict[str, Any]] = {}
    while waiting := [p for p in problems if p not in results]:
        finished = _run_child(provider, waiting, limit, snapshots, timeout)
        for problem, result in zip(waiting, finished):
            results[problem] = result
            if result["status"] == "out of memory":
                too_large = {**result, "reason": "a smaller problem was out of memory"}
                results.update({p: too_large for p in waiting if _larger(p, problem) and p not in results})
    return [results[p] for p in problems]


def _larger(a: Problem, b: Problem) -> bool:
    same_kind = a._replace(sequences=b.sequences, length=b.length, vocab=b.vocab) == b
    return same_kind and a.rows >= b.rows and a.vocab >= b.vocab


def _run_child(provider: Provider, problems: list[Problem], limit, snapshots, timeout) -> list[dict[str, Any]]:
    """Results of the first problems, at least one: the process stops where it runs out of memory."""
    task = json.dumps([provider.name, [p._asdict() for p in problems], limit, snapshots and str(snapshots), timeout])
    environment = {**os.environ, **_MALLOC}
    command = [sys.executable, "-c", "from rpo_kernels.benchmark.memory import child; child()"]
    try:
        done = subprocess.run(
            command, input=task, capture_output=True, text=True, env=environment, timeout=timeout * len(problems) + 60
        )
        output, errors, code = done.stdout, done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output, errors, code = text_of(expired.stdout), text_of(expired.stderr), "timed out"
    results = [json.loads(line[2:]) for line in output.splitlines() if line.startswith("> ")]
    stopped = results and results[-1]["status"] == "out of memory"
    if len(results) < len(problems) and not stopped:
        results.append(failure(f"{code}: {errors.strip()[-300:]}"))
    return results


def text_of(output: str | bytes | None) -> str:
    """What a process that was stopped had written."""
    return output if isinstance(output, str) else (output or b"").decode(errors="replace")


def failure(message: str) -> dict[str, Any]:
    """The result of a provider that ended with this message."""
    status = "out of memory" if _OUT_OF_MEMORY.search(message) else "failed"
    return {"status": status, "reason": " ".join(message.split())[:300]}


@contextmanager
def recorded(result: dict[str, Any], device: str, timeout: float) -> Iterator[None]:
    """An exception of the block, or its taking too long, becomes the provider's result.

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


def _attempt(provider: Provider, problem: Problem, limit, snapshots: Path | None, timeout: float) -> dict[str, Any]:
    result: dict[str, Any] = {}
    try:
        with recorded(result, problem.device, timeout):
            result.update(_measure(provider, problem, limit, snapshots))
    finally:
        if limit is not None and problem.device != "cpu":  # on a CPU the limit ends with the process
            torch.cuda.set_per_process_memory_fraction(1.0)
    return result


def child() -> None:
    """The measuring process: a task on standard input, a line of JSON for each problem on standard output."""
    name, problems, limit, snapshots, timeout = json.load(sys.stdin)
    for fields in problems:
        problem = Problem(**fields)
        (provider,) = [p for p in providers(problem.level) if p.name == name]
        torch._dynamo.reset()
        result = _attempt(provider, problem, limit, snapshots and Path(snapshots), timeout)
        print("> " + json.dumps(result), flush=True)
        if result["status"] == "out of memory":
            return


def _measure(provider: Provider, problem: Problem, limit: int | None, snapshots: Path | None) -> dict[str, Any]:
    run = provider.load(problem)
    if limit is not None:
        _limit_memory(limit, problem.device)
    inputs = Inputs.make(problem)
    input_bytes = {name: x.nbytes for name, x in inputs.named.items()}
    _step(run, inputs)  # compiles, and warms up what stays
    meter = _ResidentSet() if problem.device == "cpu" else _Allocator()
    _step(run, inputs)
    result: dict[str, Any] = {"status": "ok", "reason": None, "peak_bytes": meter.peak(), "input_bytes": input_bytes}
    if snapshots is not None:
        trace, result["parts"] = _trace(run, inputs)
        path = snapshots / (re.sub(r"\W+", "-", f"{provider.name} {problem.title}".lower()).strip("-") + ".pickle")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(trace))
        result["snapshot"] = path.name
    return result


def _step(run: Run, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    loss, _ = run(inputs)
    return torch.autograd.grad(loss, list(inputs.leaves.values()))


def _limit_memory(limit: int, device: str) -> None:
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    elif sys.platform == "linux":
        torch.ones(2**20).sum()  # torch's threads take their memory first
        resource.setrlimit(resource.RLIMIT_DATA, (_proc_status("VmData") + limit, resource.RLIM_INFINITY))


class _ResidentSet:
    """Peak of this process's resident set from now on."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
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


# Allocation traces -------------------------------------------------------------------------------------------------


def _trace(run: Run, inputs: Inputs) -> tuple[dict[str, Any], dict[str, int]]:
    """A snapshot in the form of `torch.cuda.memory._snapshot()`, and what the peak was made of."""
    if inputs.problem.device == "cpu":
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            grads = _step(run, inputs)
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = _cpu_events(profiler.profiler.kineto_results.experimental_event_tree(), ())
        snapshot = {"segments": [], "device_traces": [sorted(events, key=lambda e: e["time_us"])]}
    else:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000, clear_history=True)
        grads = _step(run, inputs)
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
    pointers = {grad.data_ptr() for grad in grads}
    return snapshot, split_peak(snapshot["device_traces"][0], pointers)


def _cpu_events(nodes, callers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The profiler's allocation events as entries of a device trace, the operators around them as stack frames."""
    kind = torch._C._profiler._EventType.Allocation
    for node in nodes:
        tag, fields = node.typed
        if tag == kind:
            frames = [{"name": name, "filename": "", "line": 0} for name in reversed(callers)]
            action = "alloc" if fields.alloc_size > 0 else "free_completed"
            times = dict(stream=0, time_us=node.start_time_ns / 1000)
            yield dict(action=action, addr=fields.ptr, size=abs(fields.alloc_size), frames=frames, **times)
        yield from _cpu_events(node.children, (*callers, node.name))


def split_peak(trace: list[dict[str, Any]], gradient_pointers: set[int]) -> dict[str, int]:
    """What was live when a device trace was at its peak: bytes of `gradients` (the blocks that end up as the
    gradients at these addresses) and of `work` (logits and all else)."""
    live: dict[int, int] = {}  # address -> index of its allocation
    total, peak, at_peak = 0, 0, {}
    for index, event in enumerate(trace):
        if event["action"] == "alloc":
            live[event["addr"]] = index
            total += event["size"]
            if total > peak:
                peak, at_peak = total, dict(live)
        elif event["action"] == "free_completed" and event["addr"] in live:
            total -= trace[live.pop(event["addr"])]["size"]
    gradients = {live[p] for p in gradient_pointers if p in live}
    sizes = {index: trace[index]["size"] for index in at_peak.values()}
    held = sum(size for index, size in sizes.items() if index in gradients)
    return {"gradients": held, "work": peak - held}
