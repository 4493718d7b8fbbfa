"""Plain torch, as written without a library."""

import torch
from torch import Tensor

from ..inputs import Inputs
from ..problem import Problem
from .registry import Run, implementation, on_plain_logits


def _eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    logps = inputs.transformed(inputs.logits).float().log_softmax(-1)
    return inputs.loss(logps.gather(-1, inputs.labels.unsqueeze(-1)).squeeze(-1))


@implementation("eager torch", "logits", head_name="eager torch")
def _(problem: Problem) -> Run:
    return _eager


@implementation("torch.compile", "logits")
def _(problem: Problem) -> Run:
    return torch.compile(_eager, dynamic=False)


@implementation("torch.compile", "head")
def _(problem: Problem) -> Run:
    return torch.compile(on_plain_logits(_eager), dynamic=False)
