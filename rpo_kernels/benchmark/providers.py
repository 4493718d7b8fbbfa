"""What is compared: a registry of ways from logits, or hidden states, to the preference loss.

A provider is added by one function that imports what it needs and returns `run(inputs) -> (loss, logps [B])`:

    @provider("name", "logits", device="cuda")
    def _(problem):
        from somewhere import fast_logps
        return lambda inputs: inputs.loss(fast_logps(inputs.logits, inputs.labels))

It raises `Unavailable` where it cannot do a problem; a missing package is found by the registry.
"""

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import RPO, rpo_loss
from ..kernels import dispatch
from .problem import BETA, Inputs, Problem

Run = Callable[[Inputs], tuple[Tensor, Tensor]]
GRADIENT_FILTER = 2**-16


class Unavailable(Exception):
    """Why a provider cannot do a problem."""


class Provider(NamedTuple):
    """One way to do a problem."""

    name: str
    level: str
    make: Callable[[Problem], Run]
    device: str | None  # the device type it needs, None for any
    package: str | None  # the distribution it comes from, None for torch and this package
    inplace: bool  # it overwrites the logits it is given
    approximate: bool  # its gradients are meant to differ, so they are held to half precision's error in any dtype

    def load(self, problem: Problem) -> Run:
        """The function to run.

        Raises:
            Unavailable: with the reason.
        """
        if reason := self.unavailable_reason(problem.device):
            raise Unavailable(reason)
        try:
            return self.make(problem)
        except ImportError as error:
            raise Unavailable(f"cannot be imported: {error}") from error

    def unavailable_reason(self, device: str) -> str | None:
        """Why it can do nothing on this device, or None."""
        if self.device is not None and self.device != device:
            return f"runs on {self.device} devices only"
        return f"{self.package} is not installed" if self.package and not self.version else None

    @property
    def version(self) -> str | None:
        """Installed version of the package behind it; None if there is none."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None


PROVIDERS: list[Provider] = []


def provider(
    name: str,
    level: str,
    *,
    device: str | None = None,
    package: str | None = None,
    inplace: bool = False,
    approximate: bool = False,
    lift: str | None = None,
) -> Callable:
    """Register a provider; as `lift`, if given, also at the head level, where it gets the logits of one plain GEMM."""

    def register(make: Callable[[Problem], Run]) -> Callable[[Problem], Run]:
        one = Provider(name, level, make, device, package, inplace, approximate)
        PROVIDERS.append(one)
        if lift:
            PROVIDERS.append(
                one._replace(name=lift, level="head", make=lambda problem: _lifted(make(problem)), inplace=False)
            )
        return make

    return register


def providers(level: str, names: list[str] | None = None) -> list[Provider]:
    """Providers of a level, all or those whose name contains one of `names`.

    Raises:
        ValueError: if no provider of either level is so named.
    """
    from . import peers  # noqa: F401  (registers)

    for name in names or []:
        if not any(name.lower() in p.name.lower() for p in PROVIDERS):
            known = sorted({p.name for p in PROVIDERS})
            raise ValueError(f"provider must be part of one of the names {', '.join(known)}; got {name!r}")
    wanted = [p for p in PROVIDERS if p.level == level]
    return [p for p in wanted if not names or any(name.lower() in p.name.lower() for name in names)]


def _lifted(run: Run) -> Run:
    return lambda inputs: run(inputs._replace(logits=F.linear(inputs.hidden, inputs.weight)))


# This package ------------------------------------------------------------------------------------------------------

_OBJECTIVE = RPO("bwd_kl", beta=BETA, target_margin=math.inf, reference_free=True)


def _keywords(problem: Problem) -> dict[str, Any]:
    return dict(
        objective=_OBJECTIVE,
        num_responses=problem.responses,
        layout="stacked",
        softcap=problem.softcap,
        logit_scale=problem.logit_scale,
    )


def _logits_level(problem: Problem, **options) -> Run:
    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        result = rpo_loss(inputs.logits, inputs.labels, inputs.rewards, **_keywords(problem), **options)
        return result.loss, result.logps

    return run


def _head_level(problem: Problem, **options) -> Run:
    from ..losses import linear_rpo_loss

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        keywords = {**_keywords(problem), **options}
        result = linear_rpo_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.rewards, **keywords)
        return result.loss, result.logps

    return run


@provider("rpo_kernels", "logits")
def _(problem: Problem) -> Run:
    return _logits_level(problem)


@provider("rpo_kernels in place", "logits", inplace=True, lift="rpo_kernels logits in place")
def _(problem: Problem) -> Run:
    return _logits_level(problem, inplace_backward=True)


@provider("rpo_kernels torch backend", "logits")
def _(problem: Problem) -> Run:
    probe = torch.empty(0, dtype=problem.torch_dtype, device=problem.device)
    if dispatch.choose(probe, None) == "torch":
        raise Unavailable("is what rpo_kernels chooses here: no faster backend is live")
    return _logits_level(problem, backend="torch")


# The exact head level by name, with its `memory_budget`: what `memory_plan` predicts.
BUDGETS = {"rpo_kernels": None, "rpo_kernels 64MB budget": "64MB"}
for _name, _budget in BUDGETS.items():
    provider(_name, "head")(functools.partial(_head_level, memory_budget=_budget))


@provider("rpo_kernels filter 2^-16", "head", approximate=True)
def _(problem: Problem) -> Run:
    return _head_level(problem, gradient_filter=GRADIENT_FILTER)


# Plain torch -------------------------------------------------------------------------------------------------------


def _eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    logps = inputs.transformed(inputs.logits).float().log_softmax(-1)
    return inputs.loss(logps.gather(-1, inputs.labels.unsqueeze(-1)).squeeze(-1))


@provider("eager torch", "logits", lift="eager torch")
def _(problem: Problem) -> Run:
    return _eager


@provider("torch.compile", "logits")
def _(problem: Problem) -> Run:
    return torch.compile(_eager, dynamic=False)


@provider("torch.compile", "head")
def _(problem: Problem) -> Run:
    return torch.compile(_lifted(_eager), dynamic=False)
