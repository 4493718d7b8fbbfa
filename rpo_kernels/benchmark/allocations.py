"""A trace of every allocation of a training pass: what its peak was made of."""

from collections.abc import Iterator
from typing import Any

import torch

from .implementations.registry import Pass
from .inputs import Inputs


def trace_step(one: Pass, inputs: Inputs) -> tuple[dict[str, Any], dict[str, int]]:
    """A snapshot in the form of `torch.cuda.memory._snapshot()`, and what the peak was made of."""
    if inputs.problem.device == "cpu":
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            grads = run_step(one, inputs)
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = _cpu_events(profiler.profiler.kineto_results.experimental_event_tree(), ())
        snapshot = {"segments": [], "device_traces": [sorted(events, key=lambda e: e["time_us"])]}
    else:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000, clear_history=True)
        grads = run_step(one, inputs)
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
    pointers = {grad.data_ptr() for grad in grads.values()}
    return snapshot, split_peak(snapshot["device_traces"][0], pointers)


def run_step(one: Pass, inputs: Inputs) -> dict[str, torch.Tensor]:
    """A forward pass and, where the case has one, a backward pass; the gradients."""
    outcome = one.forward(inputs)
    return one.backward(inputs, outcome) if inputs.leaves else {}


def _cpu_events(nodes: Any, callers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
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
