"""Parts of the first run on a GPU: what the device does at all, and which constants of the kernels are fastest.

    python bench/gpu_parts.py probe --out DIR      float32 results of products, GEMM rates, one profiler trace a head
    python bench/gpu_parts.py tune --out DIR       chunk, tile, warps, steps, splits; prints constants to paste
    python bench/gpu_parts.py evaluate --out DIR   without gradients, in one product or in two launches a tile

`--device cpu --small` runs the same code where there is no GPU, the kernels in Triton's interpreter, in seconds.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

if "--small" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported

from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import evaluation_plan, gemm, plan
from rpo_kernels.kernels import triton
from rpo_kernels.kernels.triton import softmax as tile_softmax
from rpo_kernels.kernels.triton import tiling

# Width and vocabulary; first what the prediction is most needed for.
MODELS = {"llama-3.1-8b": (4096, 128256), "gemma-3-270m": (640, 262144), "qwen2.5-0.5b": (896, 151936)}
SHAPES = ((8192, 8192), (4096, 8192), (8192, 4096), (4096, 4096), (2048, 8192), (8192, 16384))
COLUMNS_A_WARP = (512, 1024, 2048)
STEPS, PROGRAMS_A_PROCESSOR = (2, 4, 8), (4, 8, 16)  # of the row kernels
WIDTHS = (640, 896, 1536, 2304, 4096)


def probe(args: argparse.Namespace, found: dict) -> None:
    """Whether half-precision products give float32 results, their rates at the walk's shapes, and a trace a head."""
    found |= {"float32_results": {}, "tflops": {}, "heads": {}}
    for dtype in (torch.bfloat16, torch.float16):
        found["float32_results"][str(dtype)] = gemm.results_in_float32(args.device, dtype)
    for name, (width, vocab) in sizes(args).items():
        rows, tile = (16, 256) if args.small else (8192, 8192)
        for label, (m, k, n) in dict(
            logits=(rows, width, tile), PW=(rows, tile, width), dW=(tile, rows, width)
        ).items():
            left = torch.randn(m, k, device=args.device).bfloat16()
            right = torch.randn(k, n, device=args.device).bfloat16()
            out = torch.empty(m, n, device=args.device, dtype=torch.bfloat16 if label == "dW" else torch.float32)
            seconds = median_seconds(functools.partial(gemm.matmul, left, right, out), args)
            found["tflops"][f"{name} {label}"] = 2 * m * k * n / seconds / 1e12
        step = head_step(args, width, vocab)
        step()
        with profile(activities=activities(args)) as seen:
            started = time.perf_counter()
            step()
            synchronize(args)
            wall = time.perf_counter() - started
        kernels = [e for e in seen.key_averages() if device_time(e, args) > 0]
        kernels.sort(key=lambda e: -device_time(e, args))
        busy = sum(device_time(e, args) for e in kernels) / 1e6
        found["heads"][name] = {
            "seconds": wall,
            "busy_share": busy / wall,
            "launches": sum(e.count for e in kernels),
            "top": [[e.key[:80], e.count, device_time(e, args)] for e in kernels[:12]],
        }
        seen.export_chrome_trace(str(args.out / f"trace-{name}.json.gz"))


def tune(args: argparse.Namespace, found: dict) -> None:
    """Seconds of a step by rows a chunk and columns a tile, of the kernels by their constants; the winners to paste."""
    found |= {"shapes": {}, "columns_a_warp": {}, "steps": {}, "programs_a_processor": {}}
    shapes = ((16, 256), (8, 512)) if args.small else SHAPES
    for name, (width, vocab) in sizes(args).items():
        step = head_step(args, width, vocab)
        for shape in shapes:
            with shaped(shape):
                found["shapes"][f"{name} {shape[0]}x{shape[1]}"] = median_seconds(step, args)
        for columns in COLUMNS_A_WARP:
            with changed(tile_softmax, "COLUMNS_A_WARP", columns):
                found["columns_a_warp"][f"{name} {columns}"] = median_seconds(step, args)
    for steps in STEPS:
        with changed(tiling, "MOST_STEPS", steps):
            for name, work in row_kernels(args, many=True).items():
                found["steps"][f"{name} {steps}"] = median_seconds(work, args)
    for programs in PROGRAMS_A_PROCESSOR:
        with changed(tiling, "SPLIT_PROGRAMS", programs):
            for name, work in row_kernels(args, many=False).items():
                found["programs_a_processor"][f"{name} {programs}"] = median_seconds(work, args)
    best = min(shapes, key=lambda s: sum(found["shapes"][f"{name} {s[0]}x{s[1]}"] for name in sizes(args)))
    print(f"rpo_kernels/head/plan.py: _ACCELERATOR_SHAPES = ({best}, (1024, 2048))")
    for constant, key in (
        ("softmax.py: COLUMNS_A_WARP", "columns_a_warp"),
        ("tiling.py: MOST_STEPS", "steps"),
        ("tiling.py: SPLIT_PROGRAMS", "programs_a_processor"),
    ):
        print(f"rpo_kernels/kernels/triton/{constant}: {', '.join(winners(found[key]))}")


def evaluate(args: argparse.Namespace, found: dict) -> None:
    """Seconds without gradients, in one product with the softmax inside and in a product and a pass, by width."""
    found |= {"two": {}, "one": {}}
    rows, vocab = (16, 600) if args.small else (8192, 131072)
    for width in (32, 64) if args.small else WIDTHS:
        hidden = torch.randn(rows, width, device=args.device).bfloat16()
        weight = (torch.randn(vocab, width, device=args.device) / width**0.5).bfloat16()
        labels = torch.randint(vocab, (rows,), device=args.device)
        work = functools.partial(linear_token_logprobs, hidden, weight, labels, backend="triton")
        logps = []
        for way in ("two", "one"):
            with changed(evaluation_plan, "pays", lambda *_, way=way: way == "one"), torch.no_grad():
                found[way][str(width)] = median_seconds(work, args)
                logps.append(work())
        torch.testing.assert_close(*logps, rtol=1e-5, atol=1e-4)
    one = [width for width, seconds in found["one"].items() if seconds < found["two"][width]]
    print(f"rpo_kernels/head/evaluation_plan.py: in one product at widths {', '.join(one) or 'none'}; WIDEST")


def row_kernels(args: argparse.Namespace, many: bool) -> dict[str, Callable[[], object]]:
    """Both kernels on rows that fill the device, or on few, whose columns are shared by several programs."""
    rows, vocab = (8 if many else 2, 600) if args.small else (4096 if many else 64, 131072)
    logits = torch.randn(1, rows, vocab, device=args.device).bfloat16()
    labels = torch.randint(vocab, (1, rows), device=args.device)
    ones, out = torch.ones(1, rows, device=args.device), torch.empty_like(logits)
    stats = triton.row_stats(logits, labels)
    return {
        "row_stats": lambda: triton.row_stats(logits, labels),
        "row_grad": lambda: triton.row_grad(logits, labels, stats, ones, out=out),
    }


def winners(seconds: dict[str, float]) -> list[str]:
    """Of what is named "subject value", the fastest value of each subject."""
    subjects = {name.rsplit(" ", 1)[0] for name in seconds}
    of = {subject: [name for name in seconds if name.rsplit(" ", 1)[0] == subject] for subject in sorted(subjects)}
    return [min(names, key=seconds.__getitem__) for names in of.values()]


@contextlib.contextmanager
def changed(module: object, name: str, value: object) -> Iterator[None]:
    """A constant of a module replaced."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def shaped(shape: tuple[int, int]) -> Iterator[None]:
    """Plans with one shape of chunk and tile."""
    before = plan._SHAPES, plan._ACCELERATOR_SHAPES
    plan._SHAPES, plan._ACCELERATOR_SHAPES = {}, (shape, shape)
    plan._plan.cache_clear()
    try:
        yield
    finally:
        plan._SHAPES, plan._ACCELERATOR_SHAPES = before
        plan._plan.cache_clear()


def sizes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    return {"small": (32, 600)} if args.small else MODELS


def head_step(args: argparse.Namespace, width: int, vocab: int) -> Callable[[], object]:
    """Forward and backward of the head, of 8,192 rows."""
    rows = 16 if args.small else 8192
    hidden = torch.randn(rows, width, device=args.device).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, device=args.device) / width**0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (rows,), device=args.device)

    def step() -> object:
        return torch.autograd.grad(
            linear_token_logprobs(hidden, weight, labels, backend="triton").sum(), (hidden, weight)
        )

    return step


def median_seconds(work: Callable[[], object], args: argparse.Namespace) -> float:
    """Median of a few runs, after one that compiles."""
    work()
    samples = []
    for _ in range(2 if args.small else 7):
        synchronize(args)
        started = time.perf_counter()
        work()
        synchronize(args)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def activities(args: argparse.Namespace) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]


def device_time(event, args: argparse.Namespace) -> float:
    """Microseconds of a kernel, or on a CPU of an operator."""
    return event.self_device_time_total if args.device == "cuda" else event.self_cpu_time_total


PARTS = {"probe": probe, "tune": tune, "evaluate": evaluate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict = {}
    try:
        PARTS[args.part](args, found)
    finally:  # out of time too
        (args.out / f"{args.part}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
