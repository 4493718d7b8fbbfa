"""`rpo-kernels memory`: what the loss layer of a training step takes, measured and predicted, and what fits a card."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from ..head.plan import memory_plan, parse_budget
from .bench import memory_limit
from .charts import draw_memory
from .memory import failure, measure_peaks
from .models import MODELS, Model, find_model
from .problem import Problem
from .providers import BUDGETS, providers
from .reports import describe_machine, device_slug, format_bytes, print_table, save_json
from .timing import DeviceLost

# Bytes a parameter of the whole model: frozen in half precision (LoRA; the adapters are small), or mixed-precision Adam
# (half-precision weights and gradients; float32 weights and two moments).
_BYTES_PER_PARAMETER = {"lora": 2, "full": 16}
_EAGER = "eager torch"


class Prediction(NamedTuple):
    """Bytes at the peak of a training pass of the loss layer."""

    parameters: int  # the LM head's weight
    activations: int  # the hidden states
    gradients: int
    work: int  # logits and all else

    @property
    def extra(self) -> int:
        """Beyond the inputs."""
        return self.gradients + self.work

    @property
    def total(self) -> int:
        return sum(self)


def predict(problem: Problem, budget: int | str | None) -> Prediction:
    """This package's head level within a memory budget, from the planner."""
    plan = memory_plan(
        problem.rows, problem.hidden, problem.vocab, problem.torch_dtype, needs_weight=not problem.frozen,
        memory_budget=budget, softcap=problem.softcap, device=problem.device,
    )  # fmt: skip
    backward = plan.backward_bytes + plan.gradient_bytes
    gradients = plan.gradient_bytes if backward >= plan.forward_bytes else 0
    return Prediction(*_inputs(problem), gradients, max(backward, plan.forward_bytes) - gradients)


def predict_eager(problem: Problem) -> Prediction:
    """Plain torch, `(hidden @ weight.T).float().log_softmax(-1).gather(...)`: backward holds the log-probabilities,
    the gather's gradient and the log-softmax's, 12 bytes a logit; a softcap keeps its tanh as well. On a CPU a
    half-precision gradient of the weight comes from a float32 one."""
    logits = problem.rows * problem.vocab
    softmax = logits * (12 + (problem.itemsize if problem.softcap else 0))
    parameters, activations = _inputs(problem)
    gradients = activations + parameters * (not problem.frozen)
    products = logits * problem.itemsize
    if problem.device == "cpu" and problem.itemsize == 2 and not problem.frozen:
        products += 4 * problem.vocab * problem.hidden
    if softmax >= products + gradients:
        return Prediction(parameters, activations, 0, softmax)
    return Prediction(parameters, activations, gradients, products)


def _inputs(problem: Problem) -> tuple[int, int]:
    return problem.vocab * problem.hidden * problem.itemsize, problem.rows * problem.hidden * problem.itemsize


# What fits a card --------------------------------------------------------------------------------------------------


def rest_of_training(model: Model, training: str, tokens: int) -> int:
    """Bytes of everything but the loss layer: parameters and optimizer, and with gradient checkpointing one
    half-precision hidden state a layer and token. The LM head's weight is the loss layer's, unless it is tied."""
    parameters = int(model.parameters * 1e9) - model.hidden * model.vocab
    return parameters * _BYTES_PER_PARAMETER[training] + tokens * model.layers * model.hidden * 2


def fits(problem: Problem, model: Model, training: str, card: int, ours: bool) -> bool:
    """Whether a step with these responses fits the card; this package's budget is what the rest leaves."""
    rest = rest_of_training(model, training, problem.rows)
    if training == "full":  # of the head: float32 weight and two moments
        rest += 12 * model.vocab * model.hidden
    if not ours:
        return rest + predict_eager(problem).total <= card
    fixed = rest + sum(_inputs(problem)) + problem.rows * problem.hidden * problem.itemsize
    return rest + predict(problem, max(0, card - fixed)).total <= card


def largest(fitting: Callable[[int], bool]) -> int:
    """The largest n >= 0 with `fitting(n)`, which holds below some bound and not above it."""
    high = 1
    while high < 2**24 and fitting(high):
        high *= 2
    low, step = 0, high
    while step := step // 2:
        if fitting(low + step):
            low += step
    return low


def capacity_lines(problem: Problem, model: Model, card: int) -> list[list[str]]:
    """Rows of the capacity table: longest response at this K, largest K at this length."""
    lines = []
    for training in _BYTES_PER_PARAMETER:
        problem = problem._replace(frozen=training == "lora", device="cuda")
        for ours, name in ((False, _EAGER), (True, "rpo_kernels")):

            def longer(n: int, problem=problem, training=training, ours=ours) -> bool:
                return fits(problem._replace(length=n), model, training, card, ours)

            def wider(n: int, problem=problem, training=training, ours=ours) -> bool:
                return fits(problem._replace(sequences=n), model, training, card, ours)

            length, responses = largest(longer), largest(wider)
            shown = [f"{length:,} tokens", f"{responses:,}"] if length else ["does not fit", "does not fit"]
            lines.append([training, name, *shown])
    return lines


# Command -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status."""
    args = _parse(argv)
    console = Console()
    try:
        model = find_model(args.model)
        chosen = providers("head", args.providers)
        card = parse_budget(args.card, torch.device("cpu"))
    except ValueError as error:
        console.print(f"rpo-kernels memory: {error}", highlight=False)
        return 2
    problem = Problem(
        "head", args.model, args.prompts * args.responses, args.length, model.vocab, model.hidden, args.responses,
        args.dtype, args.device, model.softcap, model.logit_scale, args.frozen,
    )  # fmt: skip
    machine = describe_machine(args.device)
    path = args.out / device_slug(machine) / f"{args.name}.json"
    measured: dict[str, Any] = {}
    if not args.predict:
        snapshots = path.parent / f"{args.name}-snapshots"
        for provider in track(chosen, "measuring", console=console, transient=True):
            limit = memory_limit(args.memory_limit, args.device)
            try:
                (measured[provider.name],) = measure_peaks(provider, [problem], limit, snapshots)
            except DeviceLost as error:
                measured[provider.name] = failure(f"broke the GPU, so that the rest was not measured: {error}")
                break
    data = memory_data(problem, machine, measured)
    print_memory(console, data)
    title = f"What fits {args.card}, predicted: one prompt, {args.model}, {args.dtype}, gradient checkpointing"
    header = ["training", "loss layer", f"longest at K={args.responses}", f"largest K at {args.length} tokens"]
    single = problem._replace(sequences=args.responses)
    notes = ["lora: frozen half-precision weights; full: 16 bytes a parameter (mixed-precision Adam);"]
    notes.append("one checkpointed state a layer and token is counted, the layers' own temporaries are not")
    print_table(console, title, header, capacity_lines(single, model, card), notes)
    if measured:
        save_json(data, path)
        charts = draw_memory(data, path.parent, path.stem)
        console.print("  results: " + ", ".join(str(p) for p in [path, *charts]), highlight=False, soft_wrap=True)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="rpo-kernels memory", description=__doc__)
    parser.add_argument(
        "--model",
        default="llama-3.1-8b" if on_gpu else "qwen2.5-0.5b",
        help=f"one of {', '.join(MODELS)} (default %(default)s)",
    )
    parser.add_argument("--prompts", type=int, default=1, help="prompts a step (default 1)")
    parser.add_argument("--responses", type=int, default=2, metavar="K", help="responses a prompt (default 2)")
    parser.add_argument(
        "--length", type=int, default=2048 if on_gpu else 32, help="tokens a response (default %(default)s)"
    )
    parser.add_argument("--frozen", action="store_true", help="the LM head needs no gradient (LoRA)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--providers", nargs="+", metavar="PART", help="only those whose name contains one of these")
    parser.add_argument("--card", default="80GB", metavar="SIZE", help="memory to predict for (default 80GB)")
    parser.add_argument("--predict", action="store_true", help="predict only, run nothing")
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help='such as "16GB"; default: three quarters of what is free'
    )
    parser.add_argument("--out", type=Path, default=Path("rpo-bench"), help="folder (default rpo-bench/)")
    parser.add_argument("--name", default="memory", help="of the result files (default memory)")
    args = parser.parse_args(argv)
    for name in ("prompts", "responses", "length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def memory_data(problem: Problem, machine: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """What is saved: measurements, and predictions for the providers that have one."""
    predicted = {_EAGER: predict_eager(problem), **{name: predict(problem, b) for name, b in BUDGETS.items()}}
    return {
        "kind": "memory",
        "machine": machine,
        "title": problem.title,
        "problem": problem._asdict(),
        "providers": measured,
        "predicted": {name: prediction._asdict() for name, prediction in predicted.items()},
    }


def print_memory(console: Console, data: dict[str, Any]) -> None:
    """The table of predictions and measurements."""
    notes = [f"{n}: {r['status']}, {r['reason']}" for n, r in data["providers"].items() if r["status"] != "ok"]
    notes.append("params: the LM head; activ.: the hidden states; grads: as far as they exist at the peak;")
    notes.append("work: logits and all else; total: allocated, or predicted where nothing was run;")
    notes.append("resident: the process's resident set, or the allocator's own peak on a GPU")
    print_table(console, data["title"], *memory_lines(data), notes)


def memory_lines(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the memory table, the least first."""
    header = ["provider", "params", "activ.", "grads", "work", "total", "resident", "predicted"]
    rows = []
    for name in dict.fromkeys([*data["providers"], *data["predicted"]]):
        run, predicted = data["providers"].get(name, {}), data["predicted"].get(name)
        if run.get("status") == "ok":
            inputs = run["input_bytes"]
            parts = [inputs["weight"], inputs["hidden"], run["parts"]["gradients"], run["parts"]["work"]]
            resident = format_bytes(sum(inputs.values()) + run["peak_bytes"])
        elif predicted and not data["providers"]:
            parts, resident = list(predicted.values()), ""
        else:
            continue
        total, known = sum(parts), sum(predicted.values()) if predicted else None
        shown = f"{format_bytes(known)}\n({known / total - 1:+.1%})" if known and run else ""
        rows.append((total, [name, *map(format_bytes, [*parts, total]), resident, shown]))
    return header, [line for _, line in sorted(rows, key=lambda row: row[0])]
