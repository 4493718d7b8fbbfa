"""Launches, waits for the device and host microseconds of the head level: what a tile, a chunk and a call add.

    python bench/host_costs.py [--out DIR]

On a GPU, of the real launches. Elsewhere torch's operators on the CPU stand for its kernels and Triton's calls are
counted and left out, so that microseconds are those of Python and of torch's dispatch, without Triton's launcher.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported

from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import plan

WAITS = {"aten::nonzero", "aten::_local_scalar_dense"}  # on a GPU the host waits in these
CALLS: dict[str, dict[str, Any]] = dict(
    trained=dict(),
    frozen=dict(weight=False),
    evaluated=dict(hidden=False, weight=False),
    recomputed=dict(memory_budget=0),
    filtered=dict(gradient_filter=2.0**-20),
)
# Operators that launch nothing on a GPU: allocation, views and questions.
FREE = {
    *("empty", "empty_strided", "empty_like", "resize_", "set_", "lift_fresh", "to", "detach", "detach_", "alias"),
    *("as_strided", "as_strided_", "_reshape_alias", "view", "reshape", "flatten", "expand", "unsqueeze", "squeeze"),
    *("slice", "select", "narrow", "unbind", "transpose", "t", "permute", "numpy_T", "resolve_conj", "resolve_neg"),
    *("promote_types", "result_type", "can_cast"),
}
SAMPLES = 30
ROWS, COLUMNS, WIDTH = 16, 256, 8  # of a chunk and tile: nothing but what the host does


class Cost(NamedTuple):
    """Of one pass."""

    launches: float
    waits: float
    microseconds: float

    def less(self, other: "Cost", share: float = 1.0) -> "Cost":
        """The difference, divided."""
        return Cost(*((a - b) / share for a, b in zip(self, other)))


def measure(work: Callable[[], Any], samples: int) -> tuple[Any, Cost]:
    """The result of some work and what it cost: counted once, then timed."""
    calls: list[object] = []
    with _counted_calls(calls):
        on_gpu = torch.cuda.is_available()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
            result = work()
            _synchronize()
        events = seen.events()
        if on_gpu:
            launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
        else:
            launches = len(calls) + sum(_launches_of(event) for event in events if event.cpu_parent is None)
        waits = sum(event.name in WAITS for event in events)
        return result, Cost(launches, waits, _microseconds(work, samples))


def _launches_of(event: Any) -> int:
    """Kernels of an operator: those of the operators within it, or its own one."""
    within = sum(_launches_of(child) for child in event.cpu_children)
    name = event.name.removeprefix("aten::").removeprefix("new_")
    return within or int(event.name.startswith("aten::") and name not in FREE)


def _microseconds(work: Callable[[], Any], samples: int) -> float:
    times = []
    for _ in range(samples):
        _synchronize()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times, default=0.0)  # what else runs on the machine only adds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _counted_calls(calls: list[object]) -> Iterator[None]:
    """Under the interpreter, each call of a Triton kernel adds to the list and does nothing."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", lambda self, *_, **__: calls.append(self)),
        mock.patch("rpo_kernels.head.operator.check_label_range", lambda *_: None),  # looks at values on the CPU only
    ):
        yield


@contextlib.contextmanager
def small_shapes() -> Iterator[None]:
    """Chunks and tiles of the least size."""
    plan._plan.cache_clear()
    shapes = ((ROWS, COLUMNS), (ROWS, COLUMNS))
    with mock.patch.object(plan, "_SHAPES", {}), mock.patch.object(plan, "_ACCELERATOR_SHAPES", shapes):
        yield
    plan._plan.cache_clear()


def costs(tiles: int, chunks: int, samples: int = 0, **options: Any) -> tuple[Cost, Cost]:
    """Of forward and of backward, of a head of so many tiles and rows of so many chunks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(ROWS * chunks, WIDTH, device=device).requires_grad_(options.pop("hidden", True))
    weight = torch.randn(COLUMNS * tiles, WIDTH, device=device).requires_grad_(options.pop("weight", True))
    labels = torch.zeros(ROWS * chunks, dtype=torch.int64, device=device)
    options = {"memory_budget": "1GB", "backend": "triton", **options}
    with small_shapes():
        logps, forward = measure(lambda: linear_token_logprobs(hidden, weight, labels, **options), samples)
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        if not leaves:
            return forward, Cost(0, 0, 0)
        ones = torch.ones_like(logps)
        _, backward = measure(lambda: torch.autograd.grad(logps, leaves, ones, retain_graph=True), samples)
        return forward, backward


def table(samples: int) -> dict[str, dict[str, Cost]]:
    """Forward and backward of each call: what a tile adds (of one chunk), what a chunk adds, and an empty call."""
    found = {}
    for name, options in CALLS.items():
        few, tiles, chunks = (costs(*size, samples, **options) for size in ((4, 1), (12, 1), (4, 9)))
        for i, way in enumerate(("forward", "backward")):
            a_tile = tiles[i].less(few[i], 8)
            a_chunk = chunks[i].less(few[i], 8)  # its tiles included
            call = Cost(*(cost - 4 * tile for cost, tile in zip(few[i], a_tile)))
            found[f"{name} {way}"] = dict(tile=a_tile, chunk_of_4_tiles=a_chunk, call=call)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of host-costs.json, the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small products, of which only the host's part matters
    found = table(SAMPLES)
    print(f"{'launches, waits, host microseconds of':40}" + "".join(f"{part:>22}" for part in found["trained forward"]))
    for name, parts in found.items():
        shown = (f"{x.launches:.1f}, {x.waits:.1f}, {x.microseconds:.0f}" for x in parts.values())
        print(f"{name:40}" + "".join(f"{text:>22}" for text in shown))
    if arguments.out:
        figures = {name: {part: cost._asdict() for part, cost in parts.items()} for name, parts in found.items()}
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "host-costs.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
