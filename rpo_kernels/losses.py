"""The losses: from logits, or hidden states and the LM head, through token, sequence and group level."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_tensor
from .head.operator import linear_token_outputs
from .kernels.interface import TokenOptions
from .logprobs import token_logprobs
from .objectives import RPO, Objective
from .outputs import RequestedOutputs
from .preference import PreferenceBatch, RPOOutput
from .sequences import Layout
from .shared_rows import take_rows


def rpo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    objective: Objective = RPO(),
    num_responses: int = 2,
    layout: Layout = "grouped",
    group_ids: Sequence[int] | Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> RPOOutput:
    """Reward-aware preference loss from logits (arXiv 2502.00203).

    Args:
        logits: `[B, T, V]` for B padded responses, or `[total, V]` packed; float32, bfloat16, float16 or float64.
        labels: `[B, T]`, or `[total]` with `cu_seqlens`; int64 or int32, `ignore_index` where not scored (prompt,
            padding).
        rewards: `[B]`, any floating point or integer type, finite, in the batch's order; differentiable. Those of
            float64 and integers are compared in float64.
        ref_logps: the reference's log-probabilities, floating point: `[B]` sums over each response (weighted like the
            policy's if `token_weights` are used), or per token in the labels' shape; refused where packed labels
            have as many tokens as sequences, and could be either.
        ref_logits: the reference's logits instead, of the logits' shape; no gradient flows to them.
        objective: `RPO(...)`, a preset (`DPO()`, `IPO()`, ...) or a callable, see `rpo_kernels.objectives`.
        num_responses: K, the number of responses a prompt.
        layout: `"grouped"`: x1y1 x1y2 x2y1 x2y2; `"stacked"`: all first responses, then all second ones.
        group_ids: B integers naming each response's prompt, for groups of different sizes; replaces the former two.
            A tensor is read on the host, which breaks a compiled graph (an error under `fullgraph=True`); a list does
            not.
        token_weights: weight of each token in its response's sum, of the labels' shape and any type; a constant.
        cu_seqlens: `[B + 1]` int32 or int64 offsets of the packed responses.
        rows: `[total]` integers: which row of the logits, then `[T, V]`, each packed label is scored against. Several
            may share one, as the responses' first tokens do where a prompt is computed once: see
            `rpo_kernels.shared_prompts`, whose collator makes `labels`, `rows` and `cu_seqlens`. Without `shift`.
        temperature, softcap, logit_scale, ignore_index, shift, inplace_backward, backend: as in `token_logprobs`.

    Returns:
        `RPOOutput`.

    Raises:
        ValueError: naming the argument that does not fit, what came and what was expected. Values (finite rewards,
            rising cu_seqlens, label range) are checked on the CPU only, to avoid synchronisation with an accelerator:
            there a non-finite reward makes the loss NaN, and RPO_KERNELS_CHECK=1 checks all three.
    """
    options: dict[str, Any] = dict(
        rows=rows,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        shift=shift,
        backend=backend,
    )
    batch = PreferenceBatch.check(
        labels, rewards, objective, num_responses, layout, group_ids, token_weights, cu_seqlens, ignore_index, shift
    )
    logps = token_logprobs(logits, batch.labels, inplace_backward=inplace_backward, **options)
    ref_token_logps = None
    if ref_logits is not None:
        check_tensor("ref_logits", ref_logits)
        if ref_logps is not None:
            raise ValueError("give ref_logps or ref_logits, not both")
        if ref_logits.shape != logits.shape:
            raise ValueError(f"ref_logits must be {list(logits.shape)} as logits are; got {list(ref_logits.shape)}")
        with torch.no_grad():
            ref_token_logps = token_logprobs(ref_logits, batch.labels, **options)
    return batch.loss(logps, ref_logps, backend, ref_token_logps)


def linear_rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    objective: Objective = RPO(),
    num_responses: int = 2,
    layout: Layout = "grouped",
    group_ids: Sequence[int] | Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    memory_budget: int | str | None = None,
    gradient_filter: float | Literal["auto"] | None = None,
    backend: str | None = None,
) -> RPOOutput:
    """`rpo_loss` from hidden states and the LM head, without materialising the logits.

    Args:
        hidden: `[B, T, H]` for B padded responses, or `[total, H]` packed; float32, bfloat16, float16 or float64.
        weight: `[V, H]` of the same type, the LM head or the tied embedding.
        bias: `[V]`.
        ref_hidden: the reference's hidden states, of the width of `ref_weight`; no gradient flows to them.
        ref_weight, ref_bias: the reference's head; default: `weight` and `bias`.
        memory_budget, gradient_filter: as in `linear_token_logprobs`.
        labels, rewards, ref_logps, objective, num_responses, layout, group_ids, token_weights, cu_seqlens,
            rows: as in `rpo_loss`; `rows` are those of `hidden` and `ref_hidden`.
        temperature, softcap, logit_scale, ignore_index, shift, backend: as in `token_logprobs`.

    Returns:
        `RPOOutput`; its `dropped` is given with a gradient filter.

    Raises:
        ValueError: as `rpo_loss` and `linear_token_logprobs`.
    """
    batch = PreferenceBatch.check(
        labels, rewards, objective, num_responses, layout, group_ids, token_weights, cu_seqlens, ignore_index, shift
    )
    if rows is not None:
        hidden = take_rows("hidden", hidden, rows, labels, shift)
        ref_hidden = None if ref_hidden is None else take_rows("ref_hidden", ref_hidden, rows, labels, shift)
    options = TokenOptions(logit_scale, softcap, temperature, ignore_index, shift)
    settings: dict[str, Any] = dict(memory_budget=memory_budget, backend=backend)
    asked = RequestedOutputs.check(("dropped",) if gradient_filter is not None else ())
    scored = linear_token_outputs(
        hidden, weight, batch.labels, bias, options, asked, gradient_filter=gradient_filter, **settings
    )
    ref_token_logps = None
    if ref_hidden is not None:
        check_tensor("ref_hidden", ref_hidden)
        if ref_logps is not None:
            raise ValueError("give ref_logps or ref_hidden, not both")
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        if ref_hidden.shape != (*labels.shape, ref_weight.shape[-1]):
            raise ValueError(
                f"ref_hidden must be {[*labels.shape, ref_weight.shape[-1]]}, the labels' shape and the width of its "
                f"head; got {list(ref_hidden.shape)}"
            )
        with torch.no_grad():
            ref_token_logps = linear_token_outputs(
                ref_hidden, ref_weight, batch.labels, ref_bias, options, RequestedOutputs.check(()), **settings
            ).logps
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_weight and ref_bias go with ref_hidden, which was not given")
    return batch.loss(scored.logps, ref_logps, backend, ref_token_logps)._replace(dropped=scored.dropped)
