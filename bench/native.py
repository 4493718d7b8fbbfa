"""The native CPU backend beside its peers and beside the memory bandwidth of the machine.

    python bench/native.py                          # the main case and the table over dtypes and vocabularies
    python bench/native.py --rows 256 --cases main  # one case, smaller

"forward" is without gradients, "forward, to be trained" keeps what backward needs. Every round runs everything once,
in turn, so that a machine that slows down slows all. Medians are compared. All samples go to the JSON file.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rpo_kernels import token_logprobs
from rpo_kernels.benchmark.reports import describe_machine, save_json
from rpo_kernels.kernels import native, reference

SEQUENCES = 8
MAIN = (torch.bfloat16, 128256, 1.0)
CASES = [
    MAIN,
    (torch.float32, 128256, 0.5),
    (torch.float16, 128256, 0.5),
    (torch.bfloat16, 32000, 1.0),
    (torch.bfloat16, 151936, 0.5),
    (torch.bfloat16, 262144, 0.25),
]  # dtype, vocabulary, part of the rows
OURS = "rpo_kernels native"

Logprobs = Callable[[Tensor, Tensor], Tensor]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return eager(logits.float(), labels)


def peers(dtype: torch.dtype) -> tuple[dict[str, Logprobs], dict[str, str]]:
    """What else computes log-probabilities of labels from logits, and why some of it does not run here."""
    found: dict[str, Logprobs] = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    missing: dict[str, str] = {}
    if dtype != torch.float32:
        found["eager, float32"] = eager_float32
        found["torch.compile, float32"] = torch.compile(eager_float32, dynamic=False)
    try:
        from trl.trainer.utils import selective_log_softmax

        found["TRL selective_log_softmax"] = selective_log_softmax
    except ImportError as error:
        missing["TRL selective_log_softmax"] = str(error)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        def liger(logits, labels):
            return -liger_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

        liger(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.long))
        found["Liger cross-entropy"] = liger
    except Exception as error:
        missing["Liger cross-entropy"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, missing


class Case:
    """Logits, labels and everything that is timed on them."""

    def __init__(self, dtype: torch.dtype, vocab: int, rows: int):
        self.dtype, self.shape = dtype, (SEQUENCES, rows // SEQUENCES, vocab)
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.empty(self.shape, dtype=dtype)
        for sequence in self.logits:
            sequence.copy_(3 * torch.randn(self.shape[1:], generator=generator))
        self.labels = torch.randint(vocab, self.shape[:2], generator=generator)
        self.grad_logps = torch.randn(self.shape[:2], generator=generator)
        self.scratch = torch.empty_like(self.logits)
        self.peers, self.missing = peers(dtype)

    def kernels(self) -> dict[str, Callable[[], Any]]:
        """One pass each over logits in memory, and the machine's own passes over the same bytes."""
        words = self.logits.view(torch.int32)
        stats = native.row_stats(self.logits, self.labels)
        grad = functools.partial(native.row_grad, labels=self.labels, stats=stats, grad_logps=self.grad_logps)
        return {
            "read": words.amax,
            "copy": lambda: self.scratch.copy_(self.logits),
            "row_stats": lambda: native.row_stats(self.logits, self.labels),
            "row_grad": lambda: grad(self.logits, out=self.scratch),
            "row_grad in place": lambda: grad(self.scratch, out=self.scratch),
        }

    def forward(self, function: Logprobs) -> Tensor:
        with torch.no_grad():
            return function(self.logits, self.labels)

    def both(self, function: Logprobs, logits: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(function(logits, self.labels), logits, self.grad_logps)
        return grad

    def operators(self) -> dict[str, Callable[[], Any]]:
        ours = functools.partial(token_logprobs, backend="native")
        timed: dict[str, Callable[[], Any]] = {}
        leaf = self.logits.detach().requires_grad_()
        for name, function in {OURS: ours, **self.peers}.items():
            timed[f"{name}: forward"] = functools.partial(self.forward, function)
            timed[f"{name}: forward, to be trained"] = functools.partial(function, leaf, self.labels)
            timed[f"{name}: forward + backward"] = functools.partial(self.both, function, leaf)
        overwriting = functools.partial(token_logprobs, backend="native", inplace_backward=True)
        timed[f"{OURS}, in place: forward + backward"] = lambda: self.both(overwriting, self.overwritten)
        return timed

    def restore(self) -> None:
        """Logits that the in-place gradient may overwrite: no leaf, for autograd guards those."""
        self.scratch.copy_(self.logits)
        self.overwritten = self.scratch.detach().requires_grad_().view_as(self.scratch)

    def errors(self) -> dict[str, float]:
        """Largest error in a log-probability against float64, nats, over the first rows of each sequence."""
        few = slice(0, 4)
        exact = reference.row_stats(self.logits[:, few].double(), self.labels[:, few]).logp
        functions = {OURS: functools.partial(token_logprobs, backend="native"), **self.peers}
        return {
            name: (self.forward(function)[:, few].double() - exact).abs().max().item()
            for name, function in functions.items()
        }


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    timed = {**case.kernels(), **case.operators()}
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(rounds + 1):
        for name, function in timed.items():
            case.restore()
            start = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - start
            del result
            if round_number:  # the first round compiles
                samples[name].append(seconds)
    return samples


def summarise(samples: dict[str, list[float]]) -> dict[str, float]:
    """Ratios of medians."""
    median = {name: statistics.median(x) for name, x in samples.items()}
    ratios = {
        "row_stats / read": median["row_stats"] / median["read"],
        "row_grad / copy": median["row_grad"] / median["copy"],
        "row_grad in place / copy": median["row_grad in place"] / median["copy"],
    }
    for kind in ("forward", "forward, to be trained", "forward + backward"):
        peers = (name.split(":")[0] for name in samples if name.endswith(f": {kind}") and not name.startswith(OURS))
        fastest = min(peers, key=lambda name: median[f"{name}: {kind}"])
        ratios[f"{kind}: fastest peer ({fastest}) / ours"] = median[f"{fastest}: {kind}"] / median[f"{OURS}: {kind}"]
        if kind == "forward + backward":
            ours = median[f"{OURS}, in place: {kind}"]
            ratios[f"{kind}: fastest peer ({fastest}) / ours in place"] = median[f"{fastest}: {kind}"] / ours
    return ratios


def show(console: Console, case: Case, samples: dict[str, list[float]], errors: dict[str, float]) -> None:
    size = case.logits.nbytes
    title = (
        f"{case.shape[0] * case.shape[1]} x {case.shape[2]} {str(case.dtype)[6:]}, {torch.get_num_threads()} threads"
    )
    table = Table("", "median ms", "fastest ms", "GB/s", "error (nats)", title=title, title_justify="left")
    for name, values in samples.items():
        passes = {"copy": 2, "row_grad": 2, "row_grad in place": 2}.get(name, 3 if "backward" in name else 1)
        median = statistics.median(values)
        cells = [f"{1e3 * median:.1f}", f"{1e3 * min(values):.1f}", f"{passes * size / median / 1e9:.1f}"]
        error = errors.get(name.split(":")[0]) if name.endswith(": forward") else None
        table.add_row(name, *cells, "" if error is None else f"{error:.1e}")
    console.print(table)
    for name, reason in case.missing.items():
        console.print(f"{name} does not run here: {reason}")
    for name, ratio in summarise(samples).items():
        console.print(f"{name}: {ratio:.2f}")
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="rows of the main case, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", choices=["main", "all"], default="all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu-native.json")
    args = parser.parse_args()
    console = Console(width=120)
    report: dict[str, Any] = {"machine": describe_machine("cpu"), "native": native.info(), "cases": []}
    console.print(report["machine"] | {"native": report["native"]})
    for dtype, vocab, part in CASES if args.cases == "all" else [MAIN]:
        torch.compiler.reset()
        case = Case(dtype, vocab, int(args.rows * part))
        errors = case.errors()
        samples = measure(case, args.rounds)
        show(console, case, samples, errors)
        report["cases"].append(
            {
                "dtype": str(dtype)[6:],
                "shape": case.shape,
                "bytes": case.logits.nbytes,
                "seconds": samples,
                "errors": errors,
                "missing": case.missing,
            }
        )
        save_json(report, args.output)


if __name__ == "__main__":
    main()
