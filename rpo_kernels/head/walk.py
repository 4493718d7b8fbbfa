"""The walks over the head's logits, of which one serves a call: forward to log-probabilities, backward to gradients."""

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


class Walk(NamedTuple):
    """One way to go from hidden states to log-probabilities and back.

    forward(head, rows, plan, needs) gives the scored rows' results and what backward reads. backward(head, saved,
    labels, grad_logps, grad_entropy, needs) gives the gradients of the hidden states, weight and bias; empty where not
    needed.
    """

    forward: Callable[..., Forward]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def walk_for(head: Head, needs: Needs) -> Walk:
    """The walk that serves this head."""
    if native_head.serves(head.weight.device.type, head.weight.dtype, head.backend):
        return Walk(cpu_forward.forward, cpu_backward.backward)
    if evaluation.serves(head, needs):
        return Walk(evaluation.forward, backward)
    return Walk(forward, backward)
