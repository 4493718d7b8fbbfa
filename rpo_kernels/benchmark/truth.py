"""The float64 reference results of a problem, and whether an implementation's results agree with them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs
from .problem import Problem

_SLICE = 16384  # rows of the weight in float64 at once
_CHUNK = {"cpu": 2**24, "cuda": 2**28}  # logits in float64 at once
# By dtype: gradient error (relative) and log-probability error (nats a token) above which results are wrong.
_TOLERANCES = {"float32": (1e-3, 1e-4), "bfloat16": (0.1, 0.02), "float16": (0.1, 0.02)}


class Truth(NamedTuple):
    """Loss, response log-probabilities, and gradients at sampled vocabulary columns, float64."""

    loss: Tensor
    logps: Tensor
    columns: Tensor
    grads: dict[str, Tensor]

    def errors(self, loss: Tensor, logps: Tensor, grads: dict[str, Tensor]) -> dict[str, float]:
        """Of an implementation's results: loss, nats a response (largest), gradients (relative, in norm)."""
        nats = (logps.double() - self.logps).abs().max().item()
        errors = {"loss": (loss.double() - self.loss).abs().item(), "nats_response": nats}
        for name, true in self.grads.items():
            grad = grads[name]
            if name == "weight":
                grad = grad[self.columns]
            elif name == "logits":
                grad = grad[..., self.columns]
            difference = torch.linalg.vector_norm(grad.reshape(true.shape).double() - true)
            errors[f"grad_{name}"] = (difference / torch.linalg.vector_norm(true)).item()
        return errors


def find_truth(inputs: Inputs, columns: int = 1024) -> Truth:
    """Log-softmax, loss and gradients in float64, a few rows at a time."""
    problem, labels = inputs.problem, inputs.labels.flatten()
    chosen = torch.linspace(0, problem.vocab - 1, min(columns, problem.vocab), device=labels.device).long()
    chosen = torch.cat([chosen, labels[:columns]]).unique()
    logps, unit_columns, unit_hidden = [], [], []  # unit: d logp / d logits
    chunk = max(1, _CHUNK[problem.device] // problem.vocab)
    for start in range(0, problem.rows, chunk):
        rows = slice(start, start + chunk)
        logits = _float64_logits(inputs, rows).requires_grad_()
        logp = inputs.transformed(logits).log_softmax(-1).gather(-1, labels[rows, None]).squeeze(-1)
        logps.append(logp.detach())
        if not problem.kind.gradients:
            continue
        (unit,) = torch.autograd.grad(logp.sum(), logits)
        unit_columns.append(unit[:, chosen])
        if not problem.from_logits:
            pairs = zip(unit.split(_SLICE, -1), inputs.weight.detach().split(_SLICE))
            unit_hidden.append(sum(u @ w.double() for u, w in pairs))
    token_logps = torch.cat(logps).requires_grad_()
    loss, sums = inputs.loss(token_logps)
    grads = {}
    if problem.kind.gradients:
        (factor,) = torch.autograd.grad(loss, token_logps)
        columns_grad = factor[:, None] * torch.cat(unit_columns)
        if "logits" in problem.kind.gradients:
            grads["logits"] = columns_grad
        if "hidden" in problem.kind.gradients:
            grads["hidden"] = factor[:, None] * torch.cat(unit_hidden)
        if "weight" in problem.kind.gradients:
            grads["weight"] = columns_grad.T @ inputs.hidden.detach().flatten(0, 1).double()
    return Truth(loss.detach(), sums.detach(), chosen, grads)


def _float64_logits(inputs: Inputs, rows: slice) -> Tensor:
    if inputs.problem.from_logits:
        return inputs.logits.detach().flatten(0, 1)[rows].double()
    hidden = inputs.hidden.detach().flatten(0, 1)[rows].double()
    return torch.cat([F.linear(hidden, w.double()) for w in inputs.weight.detach().split(_SLICE)], -1)


def verdict(errors: dict[str, float], problem: Problem, approximate: bool) -> dict[str, str | None]:
    """Whether results with these errors are right for the dtype: `status` "ok" or "wrong", and `reason`."""
    gradient, nats = _TOLERANCES["bfloat16" if approximate else problem.dtype]
    for name, error in errors.items():
        if name == "loss" and problem.kind.source == "rows":
            continue  # a sum of all rows with signs: no scale to hold it against
        allowed = gradient if name.startswith("grad_") else nats * problem.length
        if not error <= allowed:  # NaN is wrong too
            return {"status": "wrong", "reason": f"{name} is off by {error:.2g}, allowed is {allowed:.2g}"}
    return {"status": "ok", "reason": None}
