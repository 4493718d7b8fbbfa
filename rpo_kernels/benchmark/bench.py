"""`rpo-kernels bench`: time, memory and error of the loss layer, this package beside the alternatives."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..head.plan import parse_budget
from .charts import draw_bench
from .memory import failure, measure_peaks, recorded
from .models import MODELS, find_model
from .problem import Inputs, Problem, Truth, find_truth, sequences_of
from .providers import Provider, Run, providers
from .reports import describe_machine, device_slug, print_bench, same_setup, save_json
from .timing import (
    DeviceLost,
    SampleError,
    free_memory,
    interleave,
    measure_bandwidth,
    measure_gemm,
    preserved,
    warm_up,
)

LEVELS = ("logits", "head", "frozen")
_START_SECONDS = 180  # a provider that compiles longer than this is given up
_TRUTH_FLOPS = {"cpu": 5e10}  # of the float64 check; on a GPU the whole problem is checked
# By dtype: gradient error (relative) and log-probability error (nats a token) above which a provider is wrong.
_TOLERANCES = {"float32": (1e-3, 1e-4), "bfloat16": (0.1, 0.02), "float16": (0.1, 0.02)}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": ["qwen2.5-0.5b"], "rows": {"logits": [256], "head": [64], "frozen": [64]}, "seconds": 10.0},
    "cuda": {
        "model": ["llama-3.1-8b", "qwen2.5-7b", "gemma-2-2b"],
        "rows": {"logits": [8192], "head": [8192], "frozen": [8192]},
        "seconds": 3.0,
    },
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the arguments describe. Returns the exit status."""
    args = parse(argv)
    console = Console()
    if args.list:
        list_providers(console, args.device)
        return 0
    try:
        problems = problems_of(args)
        chosen = {level: providers(level, args.providers) for level in ("logits", "head")}
    except ValueError as error:
        console.print(f"rpo-kernels bench: {error}", highlight=False)
        return 2
    try:
        data = run_bench(problems, chosen, args, console)
    except DeviceLost as error:
        console.print(f"rpo-kernels bench: a provider broke the GPU ({error}); --resume goes on without it")
        return 3
    print_bench(console, data)
    path = result_path(args, data["machine"])
    charts = draw_bench(data, path.parent, path.stem)
    console.print("  results: " + ", ".join(str(p) for p in [path, *charts]), highlight=False, soft_wrap=True)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rpo-kernels bench", description=__doc__)
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"shapes: {', '.join(MODELS)}")
    parser.add_argument("--level", nargs="+", choices=LEVELS, help="default: all; on a CPU logits and head")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="scored tokens; several make a sweep")
    parser.add_argument(
        "--vocab", nargs="+", type=int, metavar="V", help="instead of the model's; several make a sweep"
    )
    parser.add_argument("--responses", type=int, default=2, metavar="K", help="responses a prompt (default 2)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", nargs="+", metavar="PART", help="only those whose name contains one of these")
    parser.add_argument("--seconds", type=float, help="of sampling a problem (at least 3 samples are taken)")
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help='such as "16GB"; default: three quarters of what is free'
    )
    parser.add_argument("--out", type=Path, default=Path("rpo-bench"), help="folder (default rpo-bench/)")
    parser.add_argument("--name", default="bench", help="of the result files (default bench)")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds and measure the rest")
    parser.add_argument("--list", action="store_true", help="list providers, and why one cannot run, and stop")
    args = parser.parse_args(argv)
    if args.responses < 2:
        parser.error(f"--responses must be at least 2, got {args.responses}")
    args.seconds = args.seconds or _DEFAULTS[args.device]["seconds"]
    args.level = args.level or (LEVELS if args.device == "cuda" else LEVELS[:2])
    return args


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """The problems that the arguments ask for.

    Raises:
        ValueError: for an unknown model.
    """
    defaults = _DEFAULTS[args.device]
    problems = []
    for name in args.model or defaults["model"]:
        model = find_model(name)
        for level in args.level:
            for vocab in args.vocab or [model.vocab]:
                for rows in args.rows or defaults["rows"][level]:
                    sequences, length = sequences_of(rows, args.responses)
                    problem = Problem(
                        "logits" if level == "logits" else "head", name, sequences, length, vocab,
                        0 if level == "logits" else model.hidden, args.responses, args.dtype, args.device,
                        model.softcap, model.logit_scale, frozen=level == "frozen",
                    )  # fmt: skip
                    problems.append(problem)
    return problems


def result_path(args: argparse.Namespace, machine: dict[str, Any]) -> Path:
    """Where the results go: a folder for the device, a file for the run."""
    return args.out / device_slug(machine) / f"{args.name}.json"


def memory_limit(text: str | None, device: str) -> int | None:
    """Bytes that a measured provider may take; None, on a GPU, for what there is."""
    if text is None and device != "cpu":
        return None
    # Without a budget the planner takes a quarter of what is free.
    return parse_budget(text, torch.device(device)) * (1 if text else 3)


def list_providers(console: Console, device: str) -> None:
    """Each provider with its package's version, or why it cannot run on the device."""
    for level in ("logits", "head"):
        for p in providers(level):
            state = p.unavailable_reason(device) or f"{p.package or 'torch'} {p.version or torch.__version__}"
            console.print(f"  {level:<7}{p.name:<33}{state}", highlight=False, soft_wrap=True)


def run_bench(
    problems: list[Problem], chosen: dict[str, list[Provider]], args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Measure every provider on every problem; the result file is rewritten after each step."""
    machine = describe_machine(args.device)
    path = result_path(args, machine)
    data = _start(path, machine, args.resume)
    entries = [_entry(data, problem) for problem in problems]
    _update_rates(data, args.device)
    waiting = [(p, e) for p, e in zip(problems, entries) if not e.get("done")]
    # On a CPU a provider's process measures all problems; on a GPU each problem is finished before the next.
    batches = [waiting] if args.device == "cpu" else [[pair] for pair in waiting]
    steps = sum(len(chosen[p.level]) for p, _ in waiting) + len(waiting)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, saved(data, path):
        task = progress.add_task("", total=steps)
        for batch in batches:
            torch._dynamo.reset()
            for level, some in chosen.items():
                pairs = [(p, e) for p, e in batch if p.level == level]
                for provider in some if pairs else []:
                    progress.update(task, description=f"memory: {provider.name}")
                    _measure_memory(provider, pairs, memory_limit(args.memory_limit, args.device), data, path)
                    progress.advance(task, len(pairs))
            for problem, entry in batch:
                progress.update(task, description=f"time: {problem.title}")
                _measure_time(problem, entry, chosen[problem.level], args.seconds)
                _update_rates(data, args.device)
                entry["done"] = True
                progress.advance(task)
                save_json(data, path)
    return data


def _update_rates(data: dict[str, Any], device: str) -> None:
    """Measured again beside every problem, the best kept: on a busy machine one moment says little."""
    known = data.get("rates", {})
    data["rates"] = {name: max(rate, known.get(name, 0.0)) for name, rate in measure_bandwidth(device).items()}


@contextmanager
def saved(data: dict[str, Any], path: Path) -> Iterator[None]:
    """However the block ends, what was measured is on disk."""
    try:
        yield
    finally:
        save_json(data, path)


def _start(path: Path, machine: dict[str, Any], resume: bool) -> dict[str, Any]:
    if resume and path.exists():
        data = json.loads(path.read_text())
        if same_setup(data["machine"], machine):
            return data
    return {"kind": "bench", "machine": machine, "problems": []}


def _entry(data: dict[str, Any], problem: Problem) -> dict[str, Any]:
    for entry in data["problems"]:
        if entry["title"] == problem.title:
            return entry
    entry = {"title": problem.title, "problem": problem._asdict(), "providers": {}}
    data["problems"].append(entry)
    return entry


def _measure_memory(provider: Provider, pairs: list, limit: int | None, data: dict[str, Any], path: Path) -> None:
    new = [(p, e) for p, e in pairs if provider.name not in e["providers"]]
    for _, entry in new:  # what stands if this process does not survive
        entry["providers"][provider.name] = {"status": "failed", "reason": "the process did not survive it"}
    save_json(data, path)
    for (_, entry), result in zip(new, measure_peaks(provider, [p for p, _ in new], limit) if new else []):
        entry["providers"][provider.name] = result
    save_json(data, path)


def _measure_time(problem: Problem, entry: dict[str, Any], chosen: list[Provider], seconds: float) -> None:
    """Check, then time, the providers whose memory could be measured."""
    if problem.device == "cpu":
        torch._dynamo.reset()
    if problem.level == "head":
        entry["gemm_dtype"], entry["gemm_s"] = measure_gemm(problem)
    small = problem.small(_TRUTH_FLOPS.get(problem.device, 3e14))
    entry["checked_rows"] = small.rows
    small_inputs = Inputs.make(small)
    truth = find_truth(small_inputs)
    inputs = small_inputs if small == problem else Inputs.make(problem)
    runs = {}
    for provider in chosen:
        result = entry["providers"][provider.name]
        if result["status"] != "ok":
            continue
        with recorded(result, problem.device, _START_SECONDS):
            run = provider.load(problem)
            result["errors"] = check(run, small_inputs, truth, provider.inplace)
            result.update(verdict(result["errors"], small, provider.approximate))
            if result["status"] == "ok":
                warm_up(run, inputs, provider.inplace)
                runs[provider.name] = run
    _sample(runs, inputs, {provider.name for provider in chosen if provider.inplace}, entry, seconds)
    del inputs, small_inputs, truth
    free_memory(problem.device)


def _sample(runs: dict[str, Run], inputs: Inputs, inplace: set[str], entry: dict[str, Any], seconds: float) -> None:
    """Time the providers; one that fails is left out and the others start again."""
    try:
        for name, samples in interleave(runs, inputs, inplace, seconds).items():
            entry["providers"][name].update(samples._asdict())
    except SampleError as error:
        name, message = error.args
        entry["providers"][name].update(failure(message))
        free_memory(inputs.problem.device)
        _sample({n: run for n, run in runs.items() if n != name}, inputs, inplace, entry, seconds)


def check(run: Run, inputs: Inputs, truth: Truth, inplace: bool) -> dict[str, float]:
    """A provider's errors against float64."""
    with preserved(inputs, inplace):
        loss, logps = run(inputs)
        grads = dict(zip(inputs.leaves, torch.autograd.grad(loss, list(inputs.leaves.values()))))
        return truth.errors(loss.detach(), logps.detach(), grads)


def verdict(errors: dict[str, float], problem: Problem, approximate: bool) -> dict[str, str | None]:
    """Whether a provider's results are right for the dtype: `status` ok or wrong, and `reason`."""
    gradient, nats = _TOLERANCES["bfloat16" if approximate else problem.dtype]
    for name, error in errors.items():
        allowed = gradient if name.startswith("grad_") else nats * problem.length
        if not error <= allowed:  # NaN is wrong too
            return {"status": "wrong", "reason": f"{name} is off by {error:.2g}, allowed is {allowed:.2g}"}
    return {"status": "ok", "reason": None}
