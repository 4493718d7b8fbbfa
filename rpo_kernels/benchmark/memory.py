"""`rpo-kernels memory`: what the loss layer of a training step takes, measured and predicted, and what fits a card."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import check_writable, memory_limit
from .models import MODELS, Model, find_model, own_shape
from .predictions import EAGER, Cards, Prompts, largest_fitting_lines, predict, predict_eager
from .problem import DTYPES, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from .implementations.registry import Implementation

_MEASURED_LENGTH = 32  # tokens a response on a CPU, where more take long; predictions are for 2048
_NOTES = (
    "weight: of the LM head; hidden: the hidden states; grads: as far as they exist at the peak; work: logits and all "
    "else; total: allocated; resident: the process's resident set, or the allocator's own peak on a GPU"
)
_CAPACITY_NOTES = [
    "lora: frozen half-precision weights; full: 16 bytes a parameter (mixed-precision Adam)",
    "one checkpointed state a layer and token is counted, the layers' own temporaries are not",
    "over several cards parameters are sharded evenly",
]


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status."""
    args = parse(argv)
    print("rpo-kernels memory: loading torch", file=sys.stderr, flush=True)
    from rich.console import Console

    console = Console()
    try:
        model = _resolve(args)
        return _memory(args, model, console)
    except (ValueError, OSError) as error:
        console.print(f"rpo-kernels memory: {error}", highlight=False, soft_wrap=True)
        return 2


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rpo-kernels memory", description=__doc__)
    what = parser.add_argument_group("the step")
    what.add_argument("--model", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    what.add_argument("--hidden", type=int, metavar="H", help="a shape of your own, with --vocab and --layers")
    what.add_argument("--vocab", type=int, metavar="V")
    what.add_argument("--layers", type=int, metavar="L")
    what.add_argument("--parameters", type=float, metavar="BILLIONS", help="of it; default: of a dense model")
    what.add_argument("--prompts", type=int, default=1, help="prompts a step (default 1)")
    what.add_argument("--responses", type=int, default=2, metavar="K", help="responses a prompt (default 2)")
    what.add_argument("--length", type=int, help="tokens a response (default 2048; measured on a CPU 32)")
    what.add_argument(
        "--prompt-length",
        type=int,
        default=0,
        metavar="P",
        help="tokens a prompt, for what fits with shared prompts and without (default 0)",
    )
    what.add_argument("--frozen", action="store_true", help="the LM head needs no gradient (LoRA)")
    what.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    what.add_argument("--card", default="80GB", metavar="SIZE", help="memory to predict for (default 80GB)")
    what.add_argument(
        "--cards", type=int, default=1, metavar="N", help="that the parameters are sharded over (default 1)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--predict", action="store_true", help="predict only, run nothing")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    how.add_argument("--only", nargs="+", metavar="PART", help="implementations whose name contains one of these")
    how.add_argument("--memory-limit", metavar="SIZE", help='such as "16GB"; default: three quarters of what is free')
    how.add_argument("--out", type=Path, default=Path("rpo-bench"), help="folder (default rpo-bench/)")
    how.add_argument("--name", default="memory", help="of the result files (default memory)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as can be without torch."""
    command = parser()
    args = command.parse_args(argv)
    for name in ("prompts", "length", "hidden", "vocab", "layers", "cards", "parameters"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            command.error(f"--{name} must be positive, got {value}")
    if args.prompt_length < 0:
        command.error(f"--prompt-length must be at least 0, got {args.prompt_length}")
    if args.responses < 2:
        command.error(f"--responses must be at least 2, got {args.responses}")
    shape = [args.hidden, args.vocab, args.layers]
    if any(shape) and not all(shape):
        command.error("--hidden, --vocab and --layers go together")
    if any(shape) and args.model:
        command.error("give --model or a shape, not both")
    if args.parameters and not any(shape):
        command.error("--parameters belongs to a shape of your own: --hidden, --vocab, --layers")
    return args


def _resolve(args: argparse.Namespace) -> Model:
    """The model; fills in what depends on the device, and checks what can fail later.

    Raises:
        ValueError, OSError: for a device that is missing, an unknown model, a size that cannot be read, a folder that
            cannot be written to.
    """
    import torch

    from ..head.budget import parse_budget

    has_gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    if args.device == "cuda" and not has_gpu and not args.predict:
        raise ValueError("--device cuda: torch finds no GPU here; --predict needs none")
    args.limit = memory_limit(args.memory_limit, args.device)
    try:
        args.card_bytes = parse_budget(args.card, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(str(error).replace("memory_budget", "--card")) from None
    args.length = args.length or (2048 if args.predict or args.device == "cuda" else _MEASURED_LENGTH)
    if not args.predict:
        check_writable(args.out)
    if args.hidden:
        args.model = f"H={args.hidden}, {args.layers} layers"
        return own_shape(args.hidden, args.vocab, args.layers, args.parameters)
    args.model = args.model or ("llama-3.1-8b" if has_gpu or args.predict else "qwen2.5-0.5b")
    return find_model(args.model)


def _memory(args: argparse.Namespace, model: Model, console: "Console") -> int:
    from .charts import draw
    from .implementations.catalogue import find
    from .machine import describe_machine
    from .results import entry_of, new_results, result_path, save_json
    from .tables import Table, print_table, print_tables

    problem = Problem(
        "head-frozen" if args.frozen else "head", args.model, args.prompts * args.responses, args.length, model.vocab,
        model.hidden, args.responses, args.dtype, args.device, model.softcap, model.logit_scale,
    )  # fmt: skip
    machine = describe_machine("cpu" if args.predict else args.device)
    data = new_results("memory", machine)
    entry = entry_of(data, problem)
    entry["predicted"] = predicted(problem)
    path = result_path(args.out, machine, args.name)
    if not args.predict:
        _measure(entry, problem, find("head", args.only), path, args.limit, console)
    print_tables(console, data)
    console.print(f"  {_NOTES}", style="dim", highlight=False)
    single = problem._replace(sequences=args.responses)
    lines = largest_fitting_lines(single, model, Cards(args.card_bytes, args.cards), args.prompt_length)
    cards = args.card if args.cards == 1 else f"{args.cards} cards of {args.card}"
    title = f"What fits {cards}, predicted: one prompt a card, {args.model}, {args.dtype}, gradient checkpointing"
    header = ["training", "loss layer", f"longest at K={args.responses}", f"largest K at {args.length} tokens"]
    notes = [f"{model.parameters:.3g} billion parameters", *_CAPACITY_NOTES]
    if args.prompt_length:
        separate, shared = (Prompts(args.prompt_length, form).tokens(single) for form in (False, True))
        notes.append(
            f"prompts of {args.prompt_length} tokens: {separate:,} tokens computed as {args.responses} sequences, "
            f"{shared:,} with shared prompts; SDPA's mask of a row of T tokens takes T x T bytes more"
        )
    print_table(console, Table(title, header, lines, notes))
    if not args.predict:
        save_json(data, path)
        charts = draw(data, path.parent, path.stem)
        console.print("  results: " + ", ".join(str(p) for p in [path, *charts]), highlight=False, soft_wrap=True)
    return 0


def predicted(problem: Problem) -> dict[str, dict[str, int]]:
    """Bytes by part of every implementation that has a prediction."""
    from .implementations.ours import BUDGETS

    known = {EAGER: predict_eager(problem), **{name: predict(problem, budget) for name, budget in BUDGETS.items()}}
    return {name: prediction._asdict() for name, prediction in known.items()}


def _measure(
    entry: dict[str, Any],
    problem: Problem,
    chosen: list["Implementation"],
    path: Path,
    limit: int | None,
    console: "Console",
) -> None:
    from rich.progress import track

    from .clock import DeviceLost
    from .peaks import PeakSettings, measure_peaks
    from .results import failure

    settings = PeakSettings(limit, snapshots=str(path.parent / f"{path.stem}-snapshots"))
    for one in track(chosen, "measuring", console=console, transient=True):
        try:
            (entry["results"][one.name],) = measure_peaks(one, [problem], settings)
        except DeviceLost as error:
            entry["results"][one.name] = failure(f"broke the GPU, so that the rest was not measured: {error}")
            break
