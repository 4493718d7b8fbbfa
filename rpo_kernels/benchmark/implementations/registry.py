"""Interface and registration of the implementations of the loss layer that the benchmark compares.

An implementation is one function that imports what it needs and returns `run(inputs) -> (loss, logps [B])`:

    @implementation("name", "logits", package="some-distribution", device="cuda")
    def _(problem):
        from somewhere import fast_logps
        return lambda inputs: inputs.loss(fast_logps(inputs.logits, inputs.labels))

It raises `Unavailable` where it cannot do a problem; a missing package is found here.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import Inputs
from ..problem import Problem

Run = Callable[[Inputs], tuple[Tensor, Tensor]]


class Pass(Protocol):
    """The two halves of the work, timed apart."""

    def forward(self, inputs: Inputs) -> Any:
        """Whatever `backward` and `results` need."""

    def backward(self, inputs: Inputs, outcome: Any) -> dict[str, Tensor]:
        """Gradients of `inputs.leaves`, by name."""

    def results(self, inputs: Inputs, outcome: Any) -> tuple[Tensor, Tensor]:
        """Loss and response log-probabilities `[B]`."""


class LossPass:
    """A loss by autograd."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if inputs.leaves:
            return self._run(inputs)
        with torch.no_grad():
            return self._run(inputs)

    def backward(self, inputs: Inputs, outcome: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return dict(zip(inputs.leaves, torch.autograd.grad(outcome[0], list(inputs.leaves.values()))))

    def results(self, inputs: Inputs, outcome: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return outcome[0].detach(), outcome[1].detach()


class Unavailable(Exception):
    """Why an implementation cannot do a problem."""


class Implementation(NamedTuple):
    """One way to do the cases that start from a source."""

    name: str
    source: str
    make: Callable[[Problem], Pass]
    device: str | None = None  # the device type it needs, None for any
    package: str | None = None  # the distribution it comes from, None for torch and this package
    inplace: bool = False  # it overwrites its input logits
    approximate: bool = False  # its gradients are approximate: they are compared at half precision's error

    def load(self, problem: Problem) -> Pass:
        """Ready to run.

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

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("rpo_kernels")


REGISTRY: list[Implementation] = []


def implementation(name: str, source: str, *, head_name: str | None = None, **properties: Any) -> Callable:
    """Register the function below as an implementation with the properties of `Implementation`; with `head_name` also
    for cases that start from the head, under that name, on the logits of one plain GEMM."""

    def register(make_run: Callable[[Problem], Run]) -> Callable[[Problem], Run]:
        one = Implementation(name, source, lambda problem: LossPass(make_run(problem)), **properties)
        REGISTRY.append(one)
        if head_name is not None:
            after = one._replace(name=head_name, source="head", inplace=False)
            REGISTRY.append(after._replace(make=lambda problem: LossPass(on_plain_logits(make_run(problem)))))
        return make_run

    return register


def on_plain_logits(run: Run) -> Run:
    """An implementation for logits, given those that a plain product of hidden states and weight makes."""
    return lambda inputs: run(inputs._replace(logits=F.linear(inputs.hidden, inputs.weight)))
