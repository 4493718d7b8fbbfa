"""The head level beside its peers on a CPU: head GEMMs, peak memory, growth with the rows, and precision.

    python bench/head.py                                       # on random hidden states
    python bench/head.py --model DIR --data pairs.jsonl        # the filter and the errors on a real model's
    python bench/head.py --vocab 32768 --peer-rounds 0 --parts time sweep

Every round runs everything once, in turn, each between two plain head GEMMs, whose mean is its unit: a machine that
slows down slows both. Peers, being slow, take part in the first rounds only. Medians are compared; all samples go to
the JSON file.
"""

import argparse
import functools
import itertools
import json
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rpo_kernels import MemoryPlan, linear_token_logprobs, memory_plan
from rpo_kernels.benchmark.memory import measure_peaks
from rpo_kernels.benchmark.problem import Inputs, Problem, find_truth
from rpo_kernels.benchmark.providers import BUDGETS, Provider, Run, Unavailable, providers
from rpo_kernels.benchmark.reports import describe_machine, format_bytes, save_json

OURS, BUDGET = BUDGETS
FILTER = "rpo_kernels filter 2^-16"
IDLE_FILTER = "rpo_kernels filter that drops nothing"
PEERS = ["eager torch", "TRL chunked log-probs", "Liger fused linear DPO", "cut-cross-entropy torch_compile"]
GEMMS = {"head GEMM, float32": torch.float32, "head GEMM, bfloat16": torch.bfloat16}


class Bench:
    """What the parts share: sizes, inputs, where results go."""

    def __init__(self, args: argparse.Namespace, console: Console):
        self.args, self.console = args, console
        self.report: dict[str, Any] = {"kind": "head", "machine": describe_machine("cpu"), "real": bool(args.model)}
        self.real = real_hidden_states(args) if args.model else None
        if self.real is None:
            console.print("no --model: random hidden states; the filter's figures say nothing about a trained model\n")

    def problem(self, rows: int, frozen: bool = False, sequences: int = 8) -> Problem:
        return Problem(
            "head", "gemma-3-270m", sequences, rows // sequences, self.args.vocab, self.args.hidden, frozen=frozen
        )

    def inputs(self, problem: Problem) -> Inputs:
        """Inputs of a problem; a real model's hidden states and head if they were given."""
        made = Inputs.make(problem)
        if self.real is None:
            return made
        hidden, labels, weight = *(x[: problem.rows] for x in self.real[:2]), self.real[2][: problem.vocab]
        return made._replace(
            hidden=hidden.view(*made.labels.shape, -1).clone().requires_grad_(),
            labels=labels.view(made.labels.shape).clamp(max=problem.vocab - 1),
            weight=weight.clone().requires_grad_(not problem.frozen),
        )

    def chosen(self) -> list[Provider]:
        wanted = {OURS, BUDGET, FILTER, *(PEERS if self.args.peer_rounds else [])}
        return [p for p in providers("head") if p.name in wanted]

    def save(self) -> None:
        save_json(self.report, self.args.output)


def real_hidden_states(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of the responses in a JSONL file `[N, H]`, the tokens they predict `[N]`, and the head `[V, H]`."""
    from rpo_kernels.integrations.model_head import find_head
    from rpo_kernels.train.models import load_model, load_tokenizer

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    head = find_head(model)
    most, hidden, labels = max(args.rows, 2000, *args.sweep), [], []
    with open(args.data) as lines, torch.no_grad():
        for line in itertools.cycle(lines.readlines()):
            entry = json.loads(line)
            prompt = tokenizer(entry["prompt"])["input_ids"]
            response = tokenizer(entry["responses"][0]["text"], add_special_tokens=False)["input_ids"]
            states = head.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : -1])
            labels += response
            if len(labels) >= most:
                break
    return torch.cat(hidden).bfloat16(), torch.tensor(labels), head.weight.detach().bfloat16()


def load(bench: Bench, problem: Problem) -> tuple[dict[str, Run], dict[str, str]]:
    """Providers ready to run, and why others are not."""
    runs, missing = {}, {}
    for provider in bench.chosen():
        try:
            runs[provider.name] = provider.load(problem)
        except Unavailable as reason:
            missing[provider.name] = str(reason)
    return runs, missing


def step(run: Run, inputs: Inputs) -> None:
    loss, _ = run(inputs)
    torch.autograd.grad(loss, list(inputs.leaves.values()))


def step_with_idle_filter(inputs: Inputs) -> None:
    """The filter at its worst: every column counts, as in a model that has learnt nothing."""
    logps = linear_token_logprobs(inputs.hidden, inputs.weight, inputs.labels, gradient_filter=0.0)
    torch.autograd.grad(inputs.loss(logps)[0], list(inputs.leaves.values()))


class Samples(NamedTuple):
    """Seconds by what was timed, and of a head GEMM beside each: the mean of one just before and one just after."""

    seconds: dict[str, list[float]]
    gemm_seconds: dict[str, list[float]]

    def gemms(self, name: str) -> float:
        """Median, in head GEMMs."""
        return statistics.median(map(operator.truediv, self.seconds[name], self.gemm_seconds[name]))


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sample(functions: dict[str, Callable[[], Any]], gemm: Callable[[], Any], rounds: int, peer_rounds: int) -> Samples:
    """Time the functions in turn, each between two GEMMs, after a round in which they compile."""
    samples = Samples({name: [] for name in functions}, {name: [] for name in functions})
    for number in track(range(rounds + 1), "rounds", transient=True):
        before = timed(gemm)
        for name, function in functions.items():
            if name in PEERS and number > peer_rounds:
                continue
            seconds, after = timed(function), timed(gemm)
            if number:
                samples.seconds[name].append(seconds)
                samples.gemm_seconds[name].append((before + after) / 2)
            before = after
    return samples


def gemms_of(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """One head GEMM each in the dtypes that a CPU might do it in, the faster one first."""
    operands = [
        (name, inputs.hidden.detach().flatten(0, 1).to(dtype), inputs.weight.detach().to(dtype))
        for name, dtype in GEMMS.items()
    ]
    gemms = {name: functools.partial(torch.mm, hidden, weight.T) for name, hidden, weight in operands}
    return dict(sorted(gemms.items(), key=lambda gemm: min(timed(gemm[1]) for _ in range(2))))


def measure_time(bench: Bench) -> None:
    """Forward and backward at the main size, head trained and frozen."""
    for frozen in (False, True):
        torch.compiler.reset()
        problem = bench.problem(bench.args.rows, frozen)
        inputs = bench.inputs(problem)
        runs, missing = load(bench, problem)
        gemms = gemms_of(inputs)
        steps = {name: functools.partial(step, run, inputs) for name, run in runs.items()}
        steps[IDLE_FILTER] = functools.partial(step_with_idle_filter, inputs)
        gemm = next(iter(gemms.values()))
        samples = sample({**gemms, **steps}, gemm, bench.args.rounds, bench.args.peer_rounds)
        entry = {"title": problem.title, "rows": problem.rows, "frozen": frozen, "missing": missing}
        bench.report.setdefault("time", []).append(entry | samples._asdict())
        show_time(bench.console, problem.title, samples, missing)
        bench.save()


def show_time(console: Console, title: str, samples: Samples, missing: dict[str, str]) -> None:
    header = ["", "median s", "fastest", "slowest", "samples", "head GEMMs"]
    table = Table(*header, title=f"{title} (forward + backward)", title_justify="left")
    for name, values in samples.seconds.items():
        seconds = (f"{x:.2f}" for x in (statistics.median(values), min(values), max(values)))
        table.add_row(name, *seconds, str(len(values)), f"{samples.gemms(name):.2f}")
    console.print(table, *(f"{name} does not run here: {reason}" for name, reason in missing.items()), sep="\n")


def measure_sweep(bench: Bench) -> None:
    """Growth with the rows: this package's own, beside a GEMM of each size."""
    table = Table("rows", "head GEMM s", *(f"{x}: s, GEMMs" for x in (OURS, FILTER)), title="growth with the rows")
    for rows in bench.args.sweep:
        problem = bench.problem(rows)
        inputs = bench.inputs(problem)
        runs, _ = load(bench, problem)
        steps = {name: functools.partial(step, runs[name], inputs) for name in (OURS, FILTER)}
        gemm = next(iter(gemms_of(inputs).values()))
        samples = sample(steps, gemm, max(1, bench.args.rounds // 2), 0)
        bench.report.setdefault("sweep", []).append({"rows": rows, **samples._asdict()})
        cells = (f"{statistics.median(samples.seconds[x]):.2f}  {samples.gemms(x):.2f}" for x in steps)
        table.add_row(str(rows), f"{statistics.median(samples.gemm_seconds[OURS]):.2f}", *cells)
        bench.save()
    bench.console.print(table)


def measure_precision(bench: Bench) -> None:
    """Errors of two responses of 1,000 tokens against float64 from the same half-precision inputs."""
    problem = bench.problem(2 * bench.args.length, sequences=2)
    inputs = bench.inputs(problem)
    truth = find_truth(inputs)
    table = Table("", "nats", "dL/dhidden", "dL/dweight", title=f"errors: {problem.title}", title_justify="left")
    runs, _ = load(bench, problem)
    for name, run in runs.items():
        loss, logps = run(inputs)
        gradients = dict(zip(inputs.leaves, torch.autograd.grad(loss, list(inputs.leaves.values()))))
        errors = truth.errors(loss, logps, gradients)
        bench.report.setdefault("precision", {})[name] = errors
        table.add_row(name, *(f"{errors[x]:.1e}" for x in ("nats_response", "grad_hidden", "grad_weight")))
        bench.save()
    bench.console.print(table)


def measure_memory(bench: Bench) -> None:
    """Peak of a training pass beyond its inputs, each provider in its own process, beside the plan's prediction."""
    problem = bench.problem(bench.args.rows)
    table = Table("", "peak", "planned", title=f"peak memory beyond the inputs: {problem.title}", title_justify="left")
    for provider in bench.chosen():
        (result,) = measure_peaks(provider, [problem], None)
        if provider.name in BUDGETS:
            planned: MemoryPlan = memory_plan(
                problem.rows, problem.hidden, problem.vocab, memory_budget=BUDGETS[provider.name]
            )
            result["planned_bytes"] = planned.peak_bytes + planned.gradient_bytes
        bench.report.setdefault("memory", {})[provider.name] = result
        peak = format_bytes(result["peak_bytes"]) if result["status"] == "ok" else result["reason"]
        table.add_row(provider.name, peak, format_bytes(result["planned_bytes"]) if "planned_bytes" in result else "")
        bench.save()
    bench.console.print(table)


PARTS = {"time": measure_time, "sweep": measure_sweep, "precision": measure_precision, "memory": measure_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory, hub id or .gguf file of the model whose hidden states to take")
    parser.add_argument("--data", type=Path, help="JSONL file with prompts and responses, with --model")
    parser.add_argument("--rows", type=int, default=1024, help="scored tokens, a multiple of 8")
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--length", type=int, default=1000, help="tokens a response in the precision part")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; half of them in the sweep")
    parser.add_argument("--peer-rounds", type=int, default=3, help="how many of them peers take part in")
    parser.add_argument("--sweep", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--parts", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu-head.json")
    args = parser.parse_args()
    if args.model and not args.data:
        parser.error("--model needs --data")
    console = Console(width=120)
    bench = Bench(args, console)
    console.print(bench.report["machine"])
    for part in args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
