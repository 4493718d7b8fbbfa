"""The three levels joined: per-token log-probabilities to sequence log-ratios to the group loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import checks_values
from .fused import rpo_reduce
from .head import logprobs_and_dropped
from .kernels import dispatch
from .kernels.contract import TokenOptions
from .logprobs import token_logprobs
from .objectives import PRESETS, RPO, Objective, agreement
from .sequences import Groups, Layout, Segments, find_groups, find_segments


class RPOOutput(NamedTuple):
    """What `rpo_loss` and `linear_rpo_loss` return; float32, sequences in the batch's order.

    `loss`, `group_losses` and `logps` are differentiable, the rest is for logging.
    """

    loss: Tensor  # scalar: mean of group_losses
    group_losses: Tensor  # [G]
    logps: Tensor  # [B] policy log-probability of each response (summed with token_weights if given)
    ref_logps: Tensor | None  # [B] the same of the reference; None for a reference-free objective
    implicit_rewards: Tensor  # [B] beta * log-ratio
    accuracy: Tensor  # scalar: share of response pairs with unequal rewards ranked alike, a tie counts 1/2
    margin: Tensor  # scalar: mean over groups of implicit reward of the best minus the worst response
    dropped: Tensor | None = None  # labels' shape: what a gradient filter left out, see `linear_token_logprobs`


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
        rewards: `[B]`, any floating point or integer type, finite, in the batch's order.
        ref_logps: the reference's log-probabilities, floating point: `[B]` sums over each response (weighted like the
            policy's if `token_weights` are used), or per token in the labels' shape.
        ref_logits: the reference's logits instead, of the logits' shape; no gradient flows to them.
        objective: `RPO(...)`, a preset (`DPO()`, `IPO()`, ...) or a callable, see `rpo_kernels.objectives`.
        num_responses: K, the number of responses a prompt.
        layout: `"grouped"`: x1y1 x1y2 x2y1 x2y2; `"stacked"`: all first responses, then all second ones.
        group_ids: B integers naming each response's prompt, for groups of different sizes; replaces the former two.
        token_weights: weight of each token in its response's sum, of the labels' shape and any type; a constant.
        cu_seqlens: `[B + 1]` int32 or int64 offsets of the packed responses.
        temperature, softcap, logit_scale, ignore_index, shift, inplace_backward, backend: as in `token_logprobs`.

    Returns:
        `RPOOutput`.

    Raises:
        ValueError: naming the argument that does not fit, what came and what was expected. Values (finite rewards,
            rising cu_seqlens, label range) are checked on the CPU only, so that an accelerator is never waited for:
            there a non-finite reward makes the loss NaN, and RPO_KERNELS_CHECK=1 checks all three.
    """
    options: dict[str, Any] = dict(
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
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("give ref_logps or ref_logits, not both")
        if ref_logits.shape != logits.shape:
            raise ValueError(f"ref_logits must be {list(logits.shape)} as logits are; got {list(ref_logits.shape)}")
        with torch.no_grad():
            ref_logps = token_logprobs(ref_logits, batch.labels, **options)
    return batch.loss(logps, ref_logps, backend)


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
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    memory_budget: int | str | None = None,
    gradient_filter: float | None = None,
    backend: str | None = None,
) -> RPOOutput:
    """`rpo_loss` from hidden states and the LM head, without ever holding the logits.

    Args:
        hidden: `[B, T, H]` for B padded responses, or `[total, H]` packed; float32, bfloat16, float16 or float64.
        weight: `[V, H]` of the same type, the LM head or the tied embedding.
        bias: `[V]`.
        ref_hidden: the reference's hidden states, of the width of `ref_weight`; no gradient flows to them.
        ref_weight, ref_bias: the reference's head; default: `weight` and `bias`.
        memory_budget, gradient_filter: as in `linear_token_logprobs`.
        labels, rewards, ref_logps, objective, num_responses, layout, group_ids, token_weights, cu_seqlens: as in
            `rpo_loss`.
        temperature, softcap, logit_scale, ignore_index, shift, backend: as in `token_logprobs`.

    Returns:
        `RPOOutput`; its `dropped` is given with a gradient filter.

    Raises:
        ValueError: as `rpo_loss` and `linear_token_logprobs`.
    """
    batch = PreferenceBatch.check(
        labels, rewards, objective, num_responses, layout, group_ids, token_weights, cu_seqlens, ignore_index, shift
    )
    options = TokenOptions(logit_scale, softcap, temperature, ignore_index, shift)
    logps, dropped = logprobs_and_dropped(
        hidden, weight, batch.labels, bias, options, memory_budget, gradient_filter, backend
    )
    if ref_hidden is not None:
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
            ref_logps, _ = logprobs_and_dropped(
                ref_hidden, ref_weight, batch.labels, ref_bias, options, memory_budget, None, backend
            )
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_weight and ref_bias go with ref_hidden, which was not given")
    output = batch.loss(logps, ref_logps, backend)
    return output if gradient_filter is None else output._replace(dropped=dropped)


class PreferenceBatch(NamedTuple):
    """A checked batch: from its tokens' log-probabilities to the loss. Shared by the logits and the head level."""

    labels: Tensor
    rewards: Tensor
    objective: Objective
    segments: Segments
    groups: Groups
    token_weights: Tensor | None
    ignore_index: int
    shift: bool

    @classmethod
    def check(
        cls,
        labels: Tensor,
        rewards: Tensor,
        objective: Objective,
        num_responses: int,
        layout: Layout,
        group_ids: Sequence[int] | Tensor | None,
        token_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        ignore_index: int,
        shift: bool,
    ) -> "PreferenceBatch":
        """Build from the arguments of `rpo_loss`; ValueError names the one that does not fit."""
        if objective in PRESETS.values():
            raise ValueError(f"objective must be an RPO, such as {objective.__name__}(), got {objective!r}")
        if isinstance(objective, type) or not callable(objective):
            raise ValueError(f"objective must be an RPO or a function of [G, K] tensors, got {objective!r}")
        segments = find_segments(labels, cu_seqlens)
        groups = find_groups(segments.count, num_responses, layout, group_ids, labels.device)
        if groups.count == 0:
            raise ValueError("labels must hold at least one sequence, got none")
        _check_rewards(rewards, segments.count, labels.device)
        if token_weights is not None:
            _check_token_weights(token_weights, labels)
            token_weights = token_weights.detach()
        if shift and cu_seqlens is not None:
            # The last logits of one packed sequence do not predict the first token of the next.
            labels = labels.masked_fill(segments.starts(labels), ignore_index)
        return cls(labels, rewards, objective, segments, groups, token_weights, ignore_index, shift)

    def loss(self, token_logps: Tensor, ref_logps: Tensor | None, backend: str | None) -> RPOOutput:
        """The loss from per-token log-probabilities (of the labels' shape) and the reference's."""
        ref_logps = self._check_reference(ref_logps)
        if ref_logps is not None:
            ref_logps = ref_logps.to(token_logps.dtype)
        token_weights = None if self.token_weights is None else self.token_weights.to(token_logps.dtype)
        if type(self.objective) is RPO and dispatch.fuses_objective(token_logps, backend):
            return self._fused_loss(self.objective, token_logps, ref_logps, token_weights)
        scored = self.segments.scored(self.labels, self.ignore_index, self.shift)
        weights = scored.to(token_logps.dtype)
        if token_weights is not None:
            weights = weights * token_weights
        logps = self.segments.sum(token_logps * weights)
        log_ratios = logps
        if ref_logps is not None:
            if ref_logps.shape == self.labels.shape:
                ref_logps = self.segments.sum(torch.where(scored, ref_logps, 0) * weights)
            log_ratios = logps - ref_logps
        if getattr(self.objective, "length_normalize", False):
            log_ratios = log_ratios / self.segments.sum(scored.to(logps.dtype)).clamp(min=1)
        return self._group_loss(logps, ref_logps, log_ratios)

    def _group_loss(self, logps: Tensor, ref_logps: Tensor | None, log_ratios: Tensor) -> RPOOutput:
        groups = self.groups
        rewards = groups.gather(self.rewards.to(logps.dtype))
        group_losses = self.objective(groups.gather(log_ratios), rewards, groups.present)
        if group_losses.shape != (groups.count,):
            raise ValueError(
                f"objective must return a loss for each of the {groups.count} groups; got {list(group_losses.shape)}"
            )
        implicit = getattr(self.objective, "beta", 1.0) * log_ratios.detach()
        accuracy, margin = agreement(groups.gather(implicit), rewards, groups.present)
        return RPOOutput(group_losses.mean(), group_losses, logps, ref_logps, implicit, accuracy, margin)

    def _fused_loss(
        self, objective: RPO, token_logps: Tensor, ref_logps: Tensor | None, token_weights: Tensor | None
    ) -> RPOOutput:
        loss, group_losses, logps, ref_sums, implicit, accuracy, margin = rpo_reduce(
            token_logps,
            self.labels,
            self.rewards,
            ref_logps,
            token_weights,
            self.segments,
            self.groups,
            objective,
            self.ignore_index,
            self.shift,
        )
        reference = None if ref_logps is None else ref_sums
        return RPOOutput(loss, group_losses, logps, reference, implicit, accuracy, margin)

    def _check_reference(self, ref_logps: Tensor | None) -> Tensor | None:
        reference_free = getattr(self.objective, "reference_free", False)
        if reference_free and ref_logps is not None:
            raise ValueError("the objective is reference-free: give neither ref_logps nor a reference model's output")
        if reference_free:
            return None
        if ref_logps is not None:
            _check_tensor("ref_logps", ref_logps)
        per_sequence, per_token = [self.segments.count], list(self.labels.shape)
        if ref_logps is None:
            raise ValueError(
                f"ref_logps must be given, {per_sequence} sums or {per_token} per token, "
                "or the reference's logits or hidden states, unless the objective is reference-free"
            )
        if list(ref_logps.shape) != per_sequence and list(ref_logps.shape) != per_token:
            raise ValueError(
                f"ref_logps must be sums {per_sequence} or per token {per_token}; got {list(ref_logps.shape)}"
            )
        if ref_logps.device != self.labels.device:
            raise ValueError(f"ref_logps must be on the labels' device {self.labels.device}; got {ref_logps.device}")
        return ref_logps.detach()


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def _check_token_weights(token_weights: Tensor, labels: Tensor) -> None:
    _check_tensor("token_weights", token_weights)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights must have the labels' shape {list(labels.shape)}; got {list(token_weights.shape)}"
        )
    if token_weights.device != labels.device:
        raise ValueError(f"token_weights must be on the labels' device {labels.device}; got {token_weights.device}")


def _check_rewards(rewards: Tensor, count: int, device: torch.device) -> None:
    _check_tensor("rewards", rewards)
    if rewards.shape != (count,):
        raise ValueError(f"rewards must be one number for each of the {count} sequences; got {list(rewards.shape)}")
    if rewards.device != device:
        raise ValueError(f"rewards must be on the labels' device {device}; got {rewards.device}")
    if checks_values(rewards) and not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards must be finite; got {rewards.tolist()}")
