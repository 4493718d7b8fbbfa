"""What trainers log beside log-probabilities, where the head's operator does not give it along with them.

Entropy, mean logit and top-1 then take one product with the head more, from the logits of a few rows at a time, rounded
to the operands' type as TRL rounds them. Few losses differentiate the entropy: only for those, backward makes logits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...logprobs import token_logprobs
from ...outputs import TokenOutputs

# Logits held at a time.
CHUNK_BYTES = 2**26


class Rows(NamedTuple):
    """Labels of rows `[N]` and how logits become log-probabilities: arguments of `token_logprobs`."""

    labels: Tensor
    options: dict[str, Any]

    def outputs(self, logits: Tensor, rows: slice, names: tuple[str, ...]) -> TokenOutputs:
        """Of some of the rows."""
        return token_logprobs(logits, self.labels[rows], outputs=names, **self.options)  # type: ignore[return-value]


@torch.no_grad()
def logged_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, names: tuple[str, ...]
) -> TokenOutputs:
    """Outputs of `token_logprobs`, `[N]`, from hidden states `[N, H]` and the head, without gradients."""
    parts = [rows.outputs(nn.functional.linear(hidden[c], weight, bias), c, names) for c in _chunks(hidden, weight)]
    joined: list[Any] = [None if x[0] is None else torch.cat(x) for x in zip(*parts)]
    return TokenOutputs(*joined)


def differentiable_entropy(entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """An entropy `[N]` that was computed without a gradient, with one: backward makes the logits again, a few rows at a
    time, and only if something asks for it."""
    return _Entropy.apply(entropy.detach(), hidden, weight, bias, rows)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """At least one, which may be empty."""
    size = max(1, CHUNK_BYTES // (len(weight) * weight.element_size()))
    return (slice(start, start + size) for start in range(0, max(1, len(hidden)), size))


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, bias)
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, *head = ctx.saved_tensors
        needs_hidden, *needs_head = ctx.needs_input_grad[1:4]
        head = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(head, needs_head)]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        totals = [None if x is None or not x.requires_grad else torch.zeros_like(x, dtype=exact) for x in head]
        parts = []
        for chunk in _chunks(hidden, head[0]):
            part = hidden[chunk].detach().requires_grad_(needs_hidden)
            with torch.enable_grad():
                logits = nn.functional.linear(part, *head)
                entropy = ctx.rows.outputs(logits, chunk, ("entropy",)).entropy
            wanted = [x for x in (part, *head) if x is not None and x.requires_grad]
            gradients = iter(torch.autograd.grad(entropy, wanted, grad[chunk]))
            if needs_hidden:
                parts.append(next(gradients))
            for total in totals:
                if total is not None:
                    total += next(gradients)
        gradients_of_head = (None if t is None else t.to(x.dtype) for t, x in zip(totals, head))
        return None, torch.cat(parts) if parts else None, *gradients_of_head, None
