"""Entropy of the fused head's rows whose gradient is recomputed when it is needed.

All trainers log the entropy and few losses differentiate it, while saving for its gradient costs one more product with
the head. So forward computes it without a gradient, and a backward pass that needs the gradient recomputes it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...head import linear_token_logprobs


def differentiable_entropy(
    entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: dict[str, Any]
) -> Tensor:
    """An entropy `[N]` that was computed without a gradient, with one.

    Args:
        entropy: as `linear_token_logprobs` returned it for the other arguments, with `entropy_grad=False`.
        options: the keywords of that call beside `bias` and `outputs`.
    """
    return _Entropy.apply(entropy.detach(), hidden, weight, bias, labels, options)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: dict
    ) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, labels)
        return entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *operands, labels = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(operands, needs)]
        hidden, weight, bias = leaves
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            result: Any = linear_token_logprobs(hidden, weight, labels, bias=bias, outputs=("entropy",), **ctx.options)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(result.entropy, wanted, grad))
        return None, *(next(gradients) if need else None for need in needs), None, None
