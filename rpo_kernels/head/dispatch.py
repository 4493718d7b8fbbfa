"""Choice of the implementation of forward and backward: tiles of torch GEMMs, one fused product, or C++ on the CPU."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..kernels import native_head
from . import evaluation
from .backward import backward
from .cpu import backward as cpu_backward
from .cpu import forward as cpu_forward
from .forward import forward
from .schedule import Forward, Needs
from .tiles import Head


class Implementation(NamedTuple):
    """One implementation of the LM head.

    forward(head, rows, plan, needs) returns the scored rows' results and the tensors saved for backward.
    backward(head, saved, labels, grad_logps, grad_entropy, needs) returns the gradients of the hidden states, weight
    and bias; empty where not needed.
    """

    forward: Callable[..., Forward]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose(head: Head, needs: Needs) -> Implementation:
    """The implementation for a call."""
    if native_head.serves(head.weight.device.type, head.weight.dtype, head.backend):
        return Implementation(cpu_forward.forward, cpu_backward.backward)
    if evaluation.serves(head, needs):
        return Implementation(evaluation.forward, backward)
    return Implementation(forward, backward)
