"""Two parts of the first run on a GPU: what the device does at all, and which constants of the head level are fastest.

    python bench/gpu_parts.py probe --out DIR      float32 results of products, GEMM rates, one profiler trace a head
    python bench/gpu_parts.py tune --out DIR       chunk, tile and warps of the tile kernel; prints constants to paste

`--device cpu --small` runs the same code where there is no GPU, on sizes that take seconds.
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import gemm, plan

# Width and vocabulary; first what the prediction is most needed for.
MODELS = {"llama-3.1-8b": (4096, 128256), "gemma-3-270m": (640, 262144), "qwen2.5-0.5b": (896, 151936)}
SHAPES = ((8192, 8192), (4096, 8192), (8192, 4096), (4096, 4096), (2048, 8192), (8192, 16384))
COLUMNS_A_WARP = (512, 1024, 2048)


def probe(args: argparse.Namespace) -> dict:
    """Whether half-precision products give float32 results, their rates at the walk's shapes, and a trace a head."""
    found: dict = {"float32_results": {}, "tflops": {}, "heads": {}}
    for dtype in (torch.bfloat16, torch.float16):
        found["float32_results"][str(dtype)] = gemm.results_in_float32(args.device, dtype)
    for name, (width, vocab) in sizes(args).items():
        rows, tile = (64, 256) if args.small else (8192, 8192)
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
    return found


def tune(args: argparse.Namespace) -> dict:
    """Seconds of a step by rows a chunk and columns a tile, and by columns a warp; the winners as constants."""
    found: dict = {"shapes": {}, "columns_a_warp": {}}
    shapes = ((32, 256), (16, 512)) if args.small else SHAPES
    for name, (width, vocab) in sizes(args).items():
        step = head_step(args, width, vocab)
        for shape in shapes:
            with shaped(shape):
                found["shapes"][f"{name} {shape[0]}x{shape[1]}"] = median_seconds(step, args)
        if args.device == "cuda":
            from rpo_kernels.kernels.triton import softmax

            for columns in COLUMNS_A_WARP:
                before, softmax.COLUMNS_A_WARP = softmax.COLUMNS_A_WARP, columns
                found["columns_a_warp"][f"{name} {columns}"] = median_seconds(step, args)
                softmax.COLUMNS_A_WARP = before
    best = min(shapes, key=lambda s: sum(found["shapes"][f"{name} {s[0]}x{s[1]}"] for name in sizes(args)))
    print(f"rpo_kernels/head/plan.py: _ACCELERATOR_SHAPES = ({best}, (1024, 2048))")
    for name in sizes(args):
        warps = {key: value for key, value in found["columns_a_warp"].items() if key.startswith(name)}
        if warps:
            print(f"rpo_kernels/kernels/triton/softmax.py: COLUMNS_A_WARP, {min(warps, key=warps.__getitem__)}")
    return found


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
    return {"small": (32, 1000)} if args.small else MODELS


def head_step(args: argparse.Namespace, width: int, vocab: int) -> Callable[[], object]:
    """Forward and backward of the head, of 8,192 rows."""
    rows = 64 if args.small else 8192
    hidden = torch.randn(rows, width, device=args.device).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, device=args.device) / width**0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (rows,), device=args.device)

    def step() -> object:
        return torch.autograd.grad(linear_token_logprobs(hidden, weight, labels).sum(), (hidden, weight))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("probe", "tune"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = (probe if args.part == "probe" else tune)(args)
    (args.out / f"{args.part}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
