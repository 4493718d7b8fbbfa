"""A benchmark problem: its inputs, and what they give by the float64 definition.

Every provider does the same work: from logits, or hidden states and the LM head's weight, to a preference loss over
groups of K responses (DPO for K = 2, its Plackett-Luce form above), and back to the gradients.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.interface import TokenOptions

BETA = 0.01  # small, so that random inputs do not saturate the loss
_SLICE = 16384  # rows of the weight in float64 at once
_CHUNK = {"cpu": 2**24, "cuda": 2**28}  # logits in float64 at once


class Problem(NamedTuple):
    """Sizes of one problem; `rows` scored positions in `sequences` responses of `length` tokens."""

    level: str  # "logits" or "head"
    model: str  # where the sizes come from, for the reader
    sequences: int
    length: int
    vocab: int
    hidden: int  # 0 at the logits level
    responses: int = 2  # K: the sequences are grouped by K, stacked
    dtype: str = "bfloat16"
    device: str = "cpu"
    softcap: float | None = None
    logit_scale: float = 1.0
    frozen: bool = False  # the weight needs no gradient (LoRA, frozen head)

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def options(self) -> TokenOptions:
        return TokenOptions(logit_scale=self.logit_scale, softcap=self.softcap)

    @property
    def title(self) -> str:
        sizes = f"{self.rows} rows, " + (f"H={self.hidden}, " if self.hidden else "") + f"V={self.vocab}"
        frozen = ", frozen head" if self.frozen else ""
        return f"{self.level} level, {self.model}: {sizes}, K={self.responses}, {self.dtype}{frozen}"

    def small(self, max_flops: float) -> "Problem":
        """The problem with responses short enough for the float64 truth to cost no more than this."""
        per_row = 2.0 * self.vocab * max(self.hidden, 32)
        rows = max(int(max_flops / per_row), 8 * self.responses)
        if self.rows <= rows:
            return self
        return self._replace(sequences=self.responses, length=rows // self.responses)


def sequences_of(rows: int, responses: int, length: int = 512) -> tuple[int, int]:
    """Sequences and their length that make up about that many rows: whole groups of K, of about `length` tokens."""
    groups = max(1, round(rows / (responses * length)))
    return groups * responses, max(1, rows // (groups * responses))


class Inputs(NamedTuple):
    """The tensors of a problem. `logits` `[B, T, V]` at the logits level; else `hidden` `[B, T, H]`, `weight` `[V, H]`.

    Logits are normal around Zipf's law, as peaked as a trained model's; labels follow the same law. Rewards fall with
    the response's number, so that the first of each group is the best.
    """

    problem: Problem
    labels: Tensor  # [B, T]
    rewards: Tensor  # [B], stacked: all first responses, then all second ones
    logits: Tensor = torch.empty(0)
    hidden: Tensor = torch.empty(0)
    weight: Tensor = torch.empty(0)

    @classmethod
    def make(cls, problem: Problem, seed: int = 0) -> "Inputs":
        generator = torch.Generator(problem.device).manual_seed(seed)
        options: dict = dict(generator=generator, device=problem.device)
        shape = (problem.sequences, problem.length)
        zipf = -1.5 * torch.arange(1, problem.vocab + 1, device=problem.device).float().log()
        labels = torch.multinomial(zipf.exp(), problem.rows, replacement=True, generator=generator).reshape(shape)
        groups = problem.sequences // problem.responses
        rewards = -torch.arange(problem.responses, device=problem.device).repeat_interleave(groups).float()
        if problem.level == "logits":
            logits = torch.randn(*shape, problem.vocab, dtype=problem.torch_dtype, **options)
            # In the logits' dtype: a CPU would add a float32 row by way of a float32 copy of all.
            logits.mul_(2).add_(zipf.to(logits.dtype)).div_(problem.logit_scale)
            return cls(problem, labels, rewards, logits=logits.requires_grad_())
        hidden = torch.randn(*shape, problem.hidden, dtype=problem.torch_dtype, **options)
        weight = torch.randn(problem.vocab, problem.hidden, dtype=problem.torch_dtype, **options)
        weight.mul_(2 / math.sqrt(problem.hidden) / problem.logit_scale)
        # One direction that all hidden states share carries Zipf's law.
        hidden[..., 0] = 4
        weight[:, 0] = zipf / 4 / problem.logit_scale
        return cls(
            problem, labels, rewards, hidden=hidden.requires_grad_(), weight=weight.requires_grad_(not problem.frozen)
        )

    @property
    def named(self) -> dict[str, Tensor]:
        """The large tensors by name."""
        if self.problem.level == "logits":
            return {"logits": self.logits}
        return {"hidden": self.hidden, "weight": self.weight}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name."""
        return {name: x for name, x in self.named.items() if x.requires_grad}

    def transformed(self, logits: Tensor) -> Tensor:
        """Logits after the model's scale and softcap, in plain torch and in their own dtype, as model code does it."""
        if self.problem.logit_scale != 1:
            logits = logits * self.problem.logit_scale
        if self.problem.softcap is not None:
            logits = self.problem.softcap * torch.tanh(logits / self.problem.softcap)
        return logits

    def loss(self, token_logps: Tensor) -> tuple[Tensor, Tensor]:
        """The preference loss, and the log-probability of each response `[B]`, in plain torch."""
        logps = token_logps.reshape(self.labels.shape).sum(-1)
        implicit = BETA * logps.reshape(self.problem.responses, -1)
        return -implicit.log_softmax(0)[0].mean(), logps


class Truth(NamedTuple):
    """The float64 definition's loss, response log-probabilities, and gradients at sampled vocabulary columns."""

    loss: Tensor
    logps: Tensor
    columns: Tensor
    grads: dict[str, Tensor]

    def errors(self, loss: Tensor, logps: Tensor, grads: dict[str, Tensor]) -> dict[str, float]:
        """Of a provider's results: loss, nats a response and a token (largest), gradients (relative, in norm)."""
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
    logps, unit_columns, unit_hidden = [], [], []
    chunk = max(1, _CHUNK[problem.device] // problem.vocab)
    for start in range(0, problem.rows, chunk):
        rows = slice(start, start + chunk)
        logits = _float64_logits(inputs, rows).requires_grad_()
        logp = inputs.transformed(logits).log_softmax(-1).gather(-1, labels[rows, None]).squeeze(-1)
        (unit,) = torch.autograd.grad(logp.sum(), logits)
        logps.append(logp.detach())
        unit_columns.append(unit[:, chosen])
        if problem.level == "head":
            pairs = zip(unit.split(_SLICE, -1), inputs.weight.detach().split(_SLICE))
            unit_hidden.append(sum(u @ w.double() for u, w in pairs))
    token_logps = torch.cat(logps).requires_grad_()
    loss, sums = inputs.loss(token_logps)
    (factor,) = torch.autograd.grad(loss, token_logps)
    columns_grad = factor[:, None] * torch.cat(unit_columns)
    if problem.level == "logits":
        grads = {"logits": columns_grad}
    else:
        grads = {"hidden": factor[:, None] * torch.cat(unit_hidden)}
        if inputs.weight.requires_grad:
            grads["weight"] = columns_grad.T @ inputs.hidden.detach().flatten(0, 1).double()
    return Truth(loss.detach(), sums.detach(), chosen, grads)


def _float64_logits(inputs: Inputs, rows: slice) -> Tensor:
    if inputs.problem.level == "logits":
        return inputs.logits.detach().flatten(0, 1)[rows].double()
    hidden = inputs.hidden.detach().flatten(0, 1)[rows].double()
    return torch.cat([F.linear(hidden, w.double()) for w in inputs.weight.detach().split(_SLICE)], -1)
