"""Sequence and group level of the RPO family in one kernel launch, as a differentiable operator.

On a GPU the thirty small launches of the torch implementation (`PreferenceBatch.loss`) take longer than the pass over a
small batch's logits. Values and gradients are the same; a user's own objective always takes the torch implementation.
"""

from types import SimpleNamespace
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
    ref_sums: Tensor | None,
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
    *outputs, _ = rpo_reduce_op(
        token_logps,
        labels,
        rewards,
        ref_sums,
        ref_logps,
        token_weights,
        segments.cu_seqlens,
        groups.index,
        structure=[segments.count, groups.count, groups.size, groups.group_stride, groups.response_stride],
        distance=objective.distance,
        beta=objective.beta,
        eta=objective.eta,
        gamma=objective.gamma,
        target_margin=objective.target_margin,
        length_normalize=objective.length_normalize,
        ignore_index=ignore_index,
        shift=shift,
    )
    return tuple(outputs)


def _structure(cu_seqlens: Tensor | None, index: Tensor | None, structure: list[int]) -> tuple[Segments, Groups]:
    num_sequences, count, size, group_stride, response_stride = structure
    return Segments(num_sequences, cu_seqlens), Groups(count, size, group_stride, response_stride, index)


def _forward(
    token_logps: Tensor,
    labels: Tensor,
    rewards: Tensor,
    ref_sums: Tensor | None,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    index: Tensor | None,
    *,
    structure: list[int],
    ignore_index: int,
    shift: bool,
    **family: Any,
) -> tuple[Tensor, ...]:
    from .kernel import sequence_reduce

    _, groups = _structure(cu_seqlens, index, structure)
    return sequence_reduce(
        token_logps,
        labels,
        rewards,
        groups,
        SimpleNamespace(**family),
        ref_sums=ref_sums,
        ref_logps=ref_logps,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
    )


def _fake_forward(token_logps: Tensor, *_: Any, structure: list[int], **__: Any) -> tuple[Tensor, ...]:
    num_sequences, num_groups = structure[:2]
    shapes = ((), (num_groups,), *[(num_sequences,)] * 3, (), (), (num_sequences,))
    return tuple(token_logps.new_empty(shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple) -> None:
    _, labels, _, _, _, token_weights, cu_seqlens, index = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(output[-1], labels, token_weights, cu_seqlens, index)
    ctx.structure = keyword_only_inputs["structure"]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads[:3]):
        return (None,) * 8
    grad_loss, grad_groups, grad_logps = grads[:3]
    return rpo_reduce_grad(grad_loss, grad_groups, grad_logps, *ctx.saved_tensors, structure=ctx.structure), *[None] * 7


def _grad(
    grad_loss: Tensor | None,
    grad_groups: Tensor | None,
    grad_logps: Tensor | None,
    coef: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    index: Tensor | None,
    *,
    structure: list[int],
) -> Tensor:
    """Each sum's gradient, spread over its tokens. Positions that are not scored get it too, without effect:
    their log-probability is the constant 0, and the row kernels skip them."""
    segments, groups = _structure(cu_seqlens, index, structure)
    factor = grad_loss
    if grad_groups is not None:
        per_group = groups.spread(grad_groups * groups.count, segments.count)
        factor = per_group if factor is None else factor + per_group
    if factor is None:
        assert grad_logps is not None, "one of the three has a gradient"
        grad = grad_logps.clone()
    else:
        grad = factor * coef if grad_logps is None else torch.addcmul(grad_logps, factor, coef)
    grad = segments.spread(grad, labels)
    return grad if token_weights is None else grad * token_weights


def _fake_grad(*tensors: Tensor | None, structure: list[int]) -> Tensor:
    coef, labels, token_weights, cu_seqlens, _ = tensors[3:]
    assert coef is not None and labels is not None
    if cu_seqlens is None and token_weights is None:
        return torch.empty_like(coef).unsqueeze(-1).expand(labels.shape)
    return coef.new_empty(labels.shape)


rpo_reduce_op = register(
    "rpo_reduce(Tensor token_logps, Tensor labels, Tensor rewards, Tensor? ref_sums, Tensor? ref_logps,"
    " Tensor? token_weights, Tensor? cu_seqlens, Tensor? index, *, int[] structure, str distance, float beta,"
    " float eta, float gamma, float? target_margin, bool length_normalize, int ignore_index, bool shift)"
    " -> (Tensor loss, Tensor group_losses, Tensor logps, Tensor ref_logps, Tensor implicit_rewards,"
    " Tensor accuracy, Tensor margin, Tensor coef)",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
rpo_reduce_grad = register(
    "rpo_reduce_grad(Tensor? grad_loss, Tensor? grad_groups, Tensor? grad_logps, Tensor coef, Tensor labels,"
    " Tensor? token_weights, Tensor? cu_seqlens, Tensor? index, *, int[] structure) -> Tensor",
    _grad,
    _fake_grad,
)
