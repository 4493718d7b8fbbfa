"""Sequence and group level of the RPO family in one kernel launch, as a differentiable operator.

On a GPU the definition's thirty small launches (`PreferenceBatch.loss`) cost more than the logits pass of a small
batch. Values and gradients are the definition's; a user's own objective takes the definition.
"""

from typing import Any

import torch
from torch import Tensor

from .._registration import register
from ..objectives import RPO
from ..sequences import Groups, Segments


def rpo_reduce(
    token_logps: Tensor,
    labels: Tensor,
    rewards: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    segments: Segments,
    groups: Groups,
    objective: RPO,
    ignore_index: int,
    shift: bool,
) -> tuple[Tensor, ...]:
    """Loss, group losses, sequence sums, reference sums, implicit rewards, accuracy and margin, as in `RPOOutput`.

    `loss`, `group_losses` and the sequence sums are differentiable in `token_logps`.
    """
    outputs = torch.ops.rpo_kernels.rpo_reduce(
        token_logps,
        labels,
        rewards,
        ref_logps,
        token_weights,
        segments.cu_seqlens,
        groups.index,
        [segments.count, groups.count, groups.size, groups.group_stride, groups.response_stride],
        objective.distance,
        objective.beta,
        objective.eta,
        objective.gamma,
        objective.target_margin,
        objective.length_normalize,
        ignore_index,
        shift,
    )
    return outputs[:-1]


def _structure(cu_seqlens: Tensor | None, index: Tensor | None, layout: list[int]) -> tuple[Segments, Groups]:
    num_sequences, count, size, group_stride, response_stride = layout
    return Segments(num_sequences, cu_seqlens), Groups(count, size, group_stride, response_stride, index)


def _forward(
    token_logps, labels, rewards, ref_logps, token_weights, cu_seqlens, index, layout,
    distance, beta, eta, gamma, target_margin, length_normalize, ignore_index, shift,
):  # fmt: skip
    from .kernel import sequence_reduce

    _, groups = _structure(cu_seqlens, index, layout)
    objective = RPO(distance, beta, eta, length_normalize, target_margin=target_margin, gamma=gamma)
    return tuple(
        sequence_reduce(
            token_logps,
            labels,
            rewards,
            groups,
            objective,
            ref_logps=ref_logps,
            token_weights=token_weights,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
            shift=shift,
        )
    )


def _fake_forward(token_logps, labels, rewards, ref_logps, token_weights, cu_seqlens, index, layout, *_):
    num_sequences, num_groups = layout[:2]
    shapes = ((), (num_groups,), *[(num_sequences,)] * 3, (), (), (num_sequences,))
    return tuple(token_logps.new_empty(shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    labels, token_weights, cu_seqlens, index, layout = inputs[1], *inputs[4:8]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(labels, token_weights, cu_seqlens, index, output[-1])
    ctx.layout = layout


def _backward(ctx: Any, grad_loss: Tensor | None, grad_groups: Tensor | None, grad_logps: Tensor | None, *_: Any):
    gradients = (grad_loss, grad_groups, grad_logps)
    if all(gradient is None for gradient in gradients):
        return (None,) * 16
    labels, *structure, coef = ctx.saved_tensors
    grad = torch.ops.rpo_kernels.rpo_reduce_grad(*gradients, coef, labels, *structure, ctx.layout)
    return grad, *[None] * 15


def _grad(grad_loss, grad_groups, grad_logps, coef, labels, token_weights, cu_seqlens, index, layout):
    """Each sum's gradient, spread over its tokens. Positions that are not scored get it too, and ignore it:
    their log-probability is the constant 0, and the row kernels skip them."""
    segments, groups = _structure(cu_seqlens, index, layout)
    if grad_groups is not None:
        per_group = groups.spread(grad_groups * groups.count, segments.count)
        grad_loss = per_group if grad_loss is None else grad_loss + per_group
    if grad_loss is None:
        grad = grad_logps.clone()
    else:
        grad = grad_loss * coef if grad_logps is None else torch.addcmul(grad_logps, grad_loss, coef)
    grad = segments.spread(grad, labels)
    return grad if token_weights is None else grad * token_weights


def _fake_grad(grad_loss, grad_groups, grad_logps, coef, labels, token_weights, cu_seqlens, *_):
    if cu_seqlens is None and token_weights is None:
        return torch.empty_like(coef).unsqueeze(-1).expand(labels.shape)
    return coef.new_empty(labels.shape)


register(
    "rpo_reduce(Tensor token_logps, Tensor labels, Tensor rewards, Tensor? ref_logps, Tensor? token_weights,"
    " Tensor? cu_seqlens, Tensor? index, int[] layout, str distance, float beta, float eta, float gamma,"
    " float? target_margin, bool length_normalize, int ignore_index, bool shift)"
    " -> (Tensor loss, Tensor group_losses, Tensor logps, Tensor ref_logps, Tensor implicit_rewards,"
    " Tensor accuracy, Tensor margin, Tensor coef)",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "rpo_reduce_grad(Tensor? grad_loss, Tensor? grad_groups, Tensor? grad_logps, Tensor coef, Tensor labels,"
    " Tensor? token_weights, Tensor? cu_seqlens, Tensor? index, int[] layout) -> Tensor",
    _grad,
    _fake_grad,
)
