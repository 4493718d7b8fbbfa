"""`rpo-kernels bench`: time, memory and error of the loss layer, this package beside the alternatives."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import check_writable, memory_limit
from .models import MODELS, Model, find_model
from .problem import CASES, DTYPES, Problem, sequences_of

if TYPE_CHECKING:
    from rich.console import Console

    from .inputs import States
    from .measure import Plan

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": ["qwen2.5-0.5b"],
        "rows": {"rows": 256, "logits": 256, "head": 64},
        "case": ["logits", "head"],
        "seconds": 10.0,
    },
    "cuda": {
        "model": ["llama-3.1-8b", "qwen2.5-7b", "gemma-2-2b"],
        "rows": {"rows": 8192, "logits": 8192, "head": 8192},
        "case": ["logits", "head", "head-frozen"],
        "seconds": 3.0,
    },
}
_EPILOG = "cases:\n" + "\n".join(f"  {name:<13}{case.summary}" for name, case in CASES.items())


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the arguments describe. Returns the exit status."""
    args = parse(argv)
    print("rpo-kernels bench: loading torch", file=sys.stderr, flush=True)
    from rich.console import Console

    from .clock import DeviceLost

    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is saved, as after Ctrl-C
    try:
        resolve(args)
        if args.list:
            list_implementations(console, args.device)
            return 0
        return _bench(args, console)
    except DeviceLost as error:
        console.print(f"rpo-kernels bench: an implementation broke the GPU ({error}); --resume goes on without it")
        return 3
    except (ValueError, OSError) as error:
        console.print(f"rpo-kernels bench: {error}", highlight=False, soft_wrap=True)
        return 2


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rpo-kernels bench", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_argument_group("what is measured")
    what.add_argument("--case", nargs="+", choices=CASES, metavar="CASE", help="see below (default: logits head)")
    what.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help=f"shapes: {', '.join(MODELS)}; with --data a directory, hub id or .gguf file",
    )
    what.add_argument(
        "--data", type=Path, metavar="FILE", help="preference data: the model's hidden states on its text"
    )
    what.add_argument("--rows", nargs="+", type=int, metavar="N", help="scored tokens; several make a sweep")
    what.add_argument("--vocab", nargs="+", type=int, metavar="V", help="instead of the model's; several make a sweep")
    what.add_argument("--responses", type=int, default=2, metavar="K", help="responses a prompt (default 2)")
    what.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], metavar="DTYPE", help=" ".join(DTYPES)
    )
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    what.add_argument("--only", nargs="+", metavar="PART", help="implementations whose name contains one of these")
    what.add_argument("--base", metavar="REV", help="this package's own, beside those of another commit")
    what.add_argument("--list", action="store_true", help="list implementations, and why one cannot run, and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--seconds", type=float, help="of sampling a problem (at least 3 samples of each are taken)")
    how.add_argument("--memory-limit", metavar="SIZE", help='such as "16GB"; default: three quarters of what is free')
    how.add_argument("--time-only", action="store_true", help="do not measure peak memory")
    how.add_argument("--out", type=Path, default=Path("rpo-bench"), help="folder (default rpo-bench/)")
    how.add_argument("--name", default="bench", help="of the result files (default bench)")
    how.add_argument("--resume", action="store_true", help="keep what the result file holds and measure the rest")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as can be without torch."""
    command = parser()
    args = command.parse_args(argv)
    for name, least in (("rows", 1), ("vocab", 2), ("responses", 2)):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                command.error(f"--{name} must be at least {least}, got {number}")
    if args.seconds is not None and not args.seconds > 0:
        command.error(f"--seconds must be positive, got {args.seconds}")
    if args.data and not args.model:
        command.error("--data needs --model, the model that reads it")
    if args.data and args.vocab:
        command.error("--vocab is the model's where --data is given")
    if args.base and args.device == "cuda":
        command.error("--base compares on the CPU only")
    if os.sep in args.name or not args.name:
        command.error(f"--name must be a file's name, got {args.name!r}")
    return args


def resolve(args: argparse.Namespace) -> None:
    """Fill in what depends on the device, and check what can fail later.

    Raises:
        ValueError, OSError: for a device that is missing, an unknown model, a limit that cannot be read, a folder that
            cannot be written to.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_gpu and not args.base else "cpu")
    if args.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no GPU here")
    defaults = _DEFAULTS[args.device]
    args.seconds = args.seconds or defaults["seconds"]
    args.case = args.case or defaults["case"]
    args.model = args.model or defaults["model"]
    args.limit = memory_limit(args.memory_limit, args.device)
    if args.data is None:
        for name in args.model:
            find_model(name)
    elif not args.data.exists():
        raise ValueError(f"--data: there is nothing at {args.data}")
    if not args.list:
        check_writable(args.out)


def list_implementations(console: "Console", device: str) -> None:
    """Each implementation with its package's version, or why it cannot run on the device."""
    import torch

    from .implementations.catalogue import find

    for source in dict.fromkeys(case.source for case in CASES.values()):
        for one in find(source):
            state = one.unavailable_reason(device) or f"{one.package or 'torch'} {one.version or torch.__version__}"
            console.print(f"  {source:<7}{one.name:<33}{state}", highlight=False, soft_wrap=True)


def _bench(args: argparse.Namespace, console: "Console") -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .charts import draw
    from .compare import checkout
    from .machine import describe_machine
    from .measure import run
    from .results import new_results, result_path, resume
    from .tables import print_tables

    machine = describe_machine(args.device)
    path = result_path(args.out, machine, args.name)
    data = resume(path, "bench", machine) if args.resume else new_results("bench", machine)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("preparing", total=None)
        other = stack.enter_context(checkout(args.base)) if args.base else None
        plan = plan_of(args, other)
        progress.update(task, total=plan.steps)
        if not progress.console.is_terminal:
            console.print(f"{plan.steps} steps, results in {path}", highlight=False, soft_wrap=True)

        def report(step: str, done: int) -> None:
            progress.update(task, advance=done, description=step or None)

        run(plan, data, path, report)
    print_tables(console, data)
    charts = draw(data, path.parent, path.stem)
    console.print("  results: " + ", ".join(str(p) for p in [path, *charts]), highlight=False, soft_wrap=True)
    return 0


def plan_of(args: argparse.Namespace, other: tuple[str, str] | None = None) -> "Plan":
    """What the arguments ask for; `other` is the checkout of another commit, and the commit's name.

    Raises:
        ValueError: for an unknown implementation, or data that does not serve.
    """
    from .compare import ROOT
    from .implementations.catalogue import find
    from .measure import Plan, Subject

    sources = dict.fromkeys(CASES[case].source for case in args.case)
    chosen = {source: find(source, args.only) for source in sources}
    states = _states(args)
    subjects: dict[str, list[Subject]] = {}
    for source, implementations in chosen.items():
        if other is None:
            subjects[source] = [Subject(one) for one in implementations]
        else:  # both in separate processes, so that only the commit differs
            ours = [one for one in implementations if one.is_ours]
            subjects[source] = [s for one in ours for s in (Subject(one, str(ROOT)), Subject(one, *other))]
    return Plan(
        problems_of(args, states), subjects, args.seconds, args.limit, states and states.path, not args.time_only
    )


def _states(args: argparse.Namespace) -> "States | None":
    from .inputs import save_states

    if args.data is None:
        return None
    if len(args.model) > 1:
        raise ValueError(f"--data takes one --model, got {len(args.model)}")
    return save_states(args.model[0], args.data, max(problem.rows for problem in problems_of(args, None)))


def problems_of(args: argparse.Namespace, states: "States | None") -> list[Problem]:
    """The problems that the arguments ask for, with the sizes of a published model or of a model's states."""
    problems = []
    for name in args.model:
        shape: Model = find_model(name) if args.data is None else Model(1, 2, 0, 0)
        if states is not None:
            shape = shape._replace(**{f: getattr(states, f) for f in ("hidden", "vocab", "softcap", "logit_scale")})
        label, text = (name, None) if args.data is None else (Path(name).stem, args.data.name)
        for case in args.case:
            source = CASES[case].source
            for dtype in args.dtype:
                for vocab in args.vocab or [shape.vocab]:
                    for rows in args.rows or [_DEFAULTS[args.device]["rows"][source]]:
                        sequences, length = sequences_of(rows, args.responses)
                        problems.append(
                            Problem(
                                case, label, sequences, length, vocab, shape.hidden if source == "head" else 0,
                                args.responses, dtype, args.device, shape.softcap, shape.logit_scale, text,
                            )
                        )  # fmt: skip
    return problems
