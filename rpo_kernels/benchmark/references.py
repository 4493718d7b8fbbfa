"""Reference operations that are timed just before and just after each sample.

`read` and `copy` stream as many bytes as the logits have, at most a quarter of a gigabyte on a CPU and a gigabyte on a
GPU. `gemm` is one head GEMM, `[rows, H] x [H, V]`, in the dtype that is fastest: on a CPU bfloat16 where it has units
for that, else float32; on a GPU the problem's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .machine import has_bfloat16_units
from .problem import Problem

_MOST_BYTES = {"cpu": 2**28, "cuda": 2**30}


class Reference(NamedTuple):
    """`facts` goes to the results: `bytes` moved in a call, or the `dtype` and `flops` of a product."""

    run: Callable[[], Any]
    facts: dict[str, Any]


def make_references(problem: Problem) -> dict[str, Reference]:
    """The references of the problem's case, by name."""
    return {name: _MAKERS[name](problem) for name in problem.kind.references}


def _read(problem: Problem) -> Reference:
    source = _source(problem)
    return Reference(source.sum, {"bytes": source.nbytes})


def _copy(problem: Problem) -> Reference:
    source = _source(problem)
    target = torch.empty_like(source)
    return Reference(lambda: target.copy_(source), {"bytes": 2 * source.nbytes})


def _source(problem: Problem) -> torch.Tensor:
    size = min(problem.logits_bytes, _MOST_BYTES.get(problem.device, 2**30))
    return torch.ones(max(1, size // 4), device=problem.device)


def _gemm(problem: Problem) -> Reference:
    dtype = gemm_dtype(problem)
    options: dict[str, Any] = dict(dtype=getattr(torch, dtype), device=problem.device)
    hidden = torch.randn(problem.rows, problem.hidden, **options)
    weight = torch.randn(problem.vocab, problem.hidden, **options)
    flops = 2 * problem.rows * problem.hidden * problem.vocab
    return Reference(lambda: torch.mm(hidden, weight.T), {"dtype": dtype, "flops": flops})


def gemm_dtype(problem: Problem) -> str:
    """The dtype of the head GEMM that work on this problem is compared with."""
    if problem.device != "cpu" or problem.dtype == "float32":
        return problem.dtype
    return "bfloat16" if has_bfloat16_units() else "float32"


_MAKERS = {"read": _read, "copy": _copy, "gemm": _gemm}
