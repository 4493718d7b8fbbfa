"""This package, by its public functions, and its two row kernels by backend."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import RPO, linear_rpo_loss, rpo_loss
from ...kernels import dispatch
from ..inputs import Inputs
from ..problem import BETA, Problem
from .registry import REGISTRY, Implementation, Run, Unavailable, implementation

_OBJECTIVE = RPO("bwd_kl", beta=BETA, target_margin=math.inf, reference_free=True)
# The exact loss from hidden states, by name with its `memory_budget`: those whose memory `memory_plan` predicts.
BUDGETS = {"rpo_kernels": None, "rpo_kernels 64MB budget": "64MB"}


def _keywords(problem: Problem) -> dict[str, Any]:
    return dict(
        objective=_OBJECTIVE,
        num_responses=problem.responses,
        layout="stacked",
        softcap=problem.softcap,
        logit_scale=problem.logit_scale,
    )


def _from_logits(problem: Problem, **options) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        result = rpo_loss(inputs.logits, inputs.labels, inputs.rewards, **_keywords(problem), **options)
        return result.loss, result.logps

    return run


def _from_hidden(problem: Problem, **options) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        keywords = {**_keywords(problem), **options}
        result = linear_rpo_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.rewards, **keywords)
        return result.loss, result.logps

    return run


@implementation("rpo_kernels", "logits")
def _(problem: Problem) -> Run:
    return _from_logits(problem)


@implementation("rpo_kernels in place", "logits", inplace=True, head_name="rpo_kernels logits in place")
def _(problem: Problem) -> Run:
    if problem.from_logits and not problem.kind.gradients:
        raise Unavailable("has no gradient to write")
    return _from_logits(problem, inplace_backward=bool(problem.kind.gradients))


@implementation("rpo_kernels torch backend", "logits")
def _(problem: Problem) -> Run:
    probe = torch.empty(0, dtype=problem.torch_dtype, device=problem.device)
    if dispatch.choose(probe, None) == "torch":
        raise Unavailable("is what rpo_kernels chooses here: no faster backend is available")
    return _from_logits(problem, backend="torch")


for _name, _budget in BUDGETS.items():
    implementation(_name, "head")(functools.partial(_from_hidden, memory_budget=_budget))


def _filtered(problem: Problem, threshold: float) -> Run:
    if not problem.kind.gradients:
        raise Unavailable("filters gradients, and there is none")
    return _from_hidden(problem, gradient_filter=threshold)


for _exponent in (16, 20):
    _add = implementation(f"rpo_kernels filter 2^-{_exponent}", "head", approximate=True)
    _add(functools.partial(_filtered, threshold=2.0**-_exponent))


# The row kernels ---------------------------------------------------------------------------------------------------


class _RowKernels(NamedTuple):
    """`row_stats` as the forward pass and `row_grad` as the backward pass, without an operator around them."""

    problem: Problem
    backend: str
    inplace: bool

    @property
    def _module(self) -> Any:
        probe = torch.empty(0, dtype=self.problem.torch_dtype, device=self.problem.device)
        return dispatch.rows(probe, self.backend)

    def forward(self, inputs: Inputs) -> Any:
        return self._module.row_stats(inputs.logits.detach(), inputs.labels, self.problem.options)

    def backward(self, inputs: Inputs, outcome: Any) -> dict[str, Tensor]:
        logits = inputs.logits.detach()
        out = {"out": logits} if self.inplace else {}
        arguments = (logits, inputs.labels, outcome, inputs.grad_logps, self.problem.options)
        return {"logits": self._module.row_grad(*arguments, **out)}

    def results(self, inputs: Inputs, outcome: Any) -> tuple[Tensor, Tensor]:
        return inputs.loss(outcome.logp)


def _row_kernels(problem: Problem, backend: str, inplace: bool) -> _RowKernels:
    if reason := dispatch.unavailable_reason(backend, problem.device, problem.torch_dtype):
        raise Unavailable(reason)
    return _RowKernels(problem, backend, inplace)


for _backend in dispatch.BACKENDS:
    for _inplace in (False, True):
        _make = functools.partial(_row_kernels, backend=_backend, inplace=_inplace)
        _name = f"rpo_kernels {_backend}" + (" in place" if _inplace else "")
        REGISTRY.append(Implementation(_name, "rows", _make, inplace=_inplace))
