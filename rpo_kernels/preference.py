"""The loss from log-probabilities of tokens or scores of responses, shared by all losses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATING, INTEGER, REAL, check_device, check_integer, check_shape, check_tensor, checks_values
from .fused import rpo_reduce
from .kernels import dispatch
from .objectives import PRESETS, RPO, Objective, ranking_metrics
from .sequences import Groups, Layout, Segments, find_groups, find_segments


class RPOOutput(NamedTuple):
    """What the losses return; float32 (float64 from float64), sequences in the batch's order.

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


def preference_loss(
    token_logps: Tensor,
    labels: Tensor,
    rewards: Tensor,
    *,
    ref_logps: Tensor | None = None,
    objective: Objective = RPO(),
    num_responses: int = 2,
    layout: Layout = "grouped",
    group_ids: Sequence[int] | Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    backend: str | None = None,
) -> RPOOutput:
    """`rpo_loss` from the tokens' log-probabilities, where these are computed elsewhere.

    Args:
        token_logps: `[B, T]` natural log-probabilities of the labels, or `[total]` with `cu_seqlens`; floating point.
            Values at positions that are not scored are ignored.
        labels: of the same shape, int64 or int32; only read for which positions are scored: all but `ignore_index`
            and, with `shift`, the first of each response.
        backend: `"triton"` and None on an accelerator fuse the built-in objectives, `"torch"` does not.
        rewards, ref_logps, objective, num_responses, layout, group_ids, token_weights, cu_seqlens: as in `rpo_loss`.

    Returns:
        `RPOOutput`, differentiable in `token_logps`; in `rewards` and a tensor `beta` or `eta` of the objective too.

    Raises:
        ValueError: as `rpo_loss`.
    """
    check_tensor("token_logps", token_logps)
    batch = PreferenceBatch.check(
        labels, rewards, objective, num_responses, layout, group_ids, token_weights, cu_seqlens, ignore_index, shift
    )
    check_shape("token_logps", token_logps, labels.shape, "the labels' shape")
    check_device("token_logps", token_logps, labels.device, "the labels'")
    return batch.loss(torch.where(batch.scored, _exact(token_logps), 0), ref_logps, backend)


def score_loss(
    scores: Tensor,
    rewards: Tensor,
    *,
    objective: Objective = RPO(),
    num_responses: int = 2,
    layout: Layout = "grouped",
    group_ids: Sequence[int] | Tensor | None = None,
    backend: str | None = None,
) -> RPOOutput:
    """The preference loss from one score per response, in place of its log-ratio.

    For diffusion and flow models the score of a sample is minus the difference of the policy's and the reference's
    denoising errors (Diffusion-DPO, arXiv 2311.12908, eq. 14); the objective's `beta` then holds the paper's `beta T`.

    Args:
        scores: `[B]`, floating point: log-ratios to the reference, or another quantity in their place.
        rewards: `[B]`, finite, in the batch's order.
        objective: as in `rpo_loss`, but not length-normalised: a score has no length.
        num_responses, layout, group_ids: as in `rpo_loss`.
        backend: as in `preference_loss`.

    Returns:
        `RPOOutput`, differentiable in `scores`; its `logps` are the scores and `ref_logps` None.

    Properties of the built-in objectives, which tests/fuzz checks: neither the order of groups nor that of responses
    within one matters; a constant added to a group's scores or rewards changes nothing; a batch beside its copy has
    the same loss, and each half's gradient is half as large.

    Raises:
        ValueError: as `rpo_loss`.
    """
    check_tensor("scores", scores)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be [B], one number for each of B > 0 responses; got shape {list(scores.shape)}")
    if getattr(objective, "length_normalize", False):
        raise ValueError(f"objective must not be length-normalised, a score has no length; got {objective!r}")
    # A score is the log-ratio of a response of one token.
    labels = torch.zeros(len(scores), 1, dtype=torch.int64, device=scores.device)
    batch = PreferenceBatch.check(labels, rewards, objective, num_responses, layout, group_ids, None, None, -100, False)
    return batch.loss_of_ratios(_exact(scores)[:, None], Reference(), backend)


class PreferenceBatch(NamedTuple):
    """A checked batch: from its tokens' log-probabilities to the loss."""

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
        if any(objective is preset for preset in PRESETS.values()):
            raise ValueError(f"objective must be an RPO, such as {objective.__name__}(), got {objective!r}")
        if isinstance(objective, type) or not callable(objective):
            raise ValueError(f"objective must be an RPO or a function of [G, K] tensors, got {objective!r}")
        check_tensor("labels", labels, INTEGER)
        check_integer("ignore_index", ignore_index)
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

    @property
    def scored(self) -> Tensor:
        """Which tokens are scored, bool of the labels' shape."""
        return self.segments.scored(self.labels, self.ignore_index, self.shift)

    def loss(
        self,
        token_logps: Tensor,
        ref_logps: Tensor | None,
        backend: str | None,
        ref_token_logps: Tensor | None = None,
    ) -> RPOOutput:
        """The loss from the tokens' log-probabilities, of the labels' shape and 0 where not scored.

        `ref_logps` is the caller's argument, in either shape; `ref_token_logps` the reference's, computed here.
        """
        reference = self._check_reference(ref_logps, ref_token_logps)
        return self.loss_of_ratios(token_logps, reference, backend)

    def loss_of_ratios(self, token_logps: Tensor, reference: "Reference", backend: str | None) -> RPOOutput:
        """The same; without a reference the log-probabilities are the log-ratios, whatever the objective."""
        dtype = token_logps.dtype
        token_weights = None if self.token_weights is None else self.token_weights.to(dtype)
        reference = Reference(*(None if x is None else x.to(dtype) for x in reference))
        if self._fuses(token_logps, backend):
            return self._fused_loss(token_logps, reference, token_weights)
        scored = self.scored
        weights = scored.to(dtype) if token_weights is None else torch.where(scored, token_weights, 0)
        logps = self.segments.sum(token_logps * weights)
        ref_logps = reference.sums
        if reference.tokens is not None:
            ref_logps = self.segments.sum(torch.where(scored, reference.tokens, 0) * weights)
        log_ratios = logps if ref_logps is None else logps - ref_logps
        if getattr(self.objective, "length_normalize", False):
            log_ratios = log_ratios / self.segments.sum(scored.to(dtype)).clamp(min=1)
        return self._group_loss(logps, ref_logps, log_ratios)

    def _fuses(self, token_logps: Tensor, backend: str | None) -> bool:
        """The kernel has no gradient in rewards and takes the objective's constants as numbers."""
        return (
            type(self.objective) is RPO
            and self.objective.is_constant
            and not (self.rewards.requires_grad and torch.is_grad_enabled())
            and dispatch.fuses_objective(token_logps, backend)
        )

    def _group_loss(self, logps: Tensor, ref_logps: Tensor | None, log_ratios: Tensor) -> RPOOutput:
        groups = self.groups
        # Rewards wider than float32 keep their dtype: rounded, different ones could become equal.
        wide = self.rewards.dtype == torch.float64 or not self.rewards.is_floating_point()
        rewards = groups.gather(self.rewards.to(torch.float64 if wide else logps.dtype))
        group_losses = self.objective(groups.gather(log_ratios), rewards, groups.present)
        if not isinstance(group_losses, Tensor) or group_losses.dtype not in FLOATING:
            got = group_losses.dtype if isinstance(group_losses, Tensor) else type(group_losses).__name__
            raise ValueError(f"objective must return a floating-point tensor, the loss of each group; got {got}")
        if group_losses.shape != (groups.count,):
            raise ValueError(
                f"objective must return a loss for each of the {groups.count} groups; got {list(group_losses.shape)}"
            )
        group_losses = group_losses.to(logps.dtype)
        implicit = (getattr(self.objective, "beta", 1.0) * log_ratios).detach()
        accuracy, margin = ranking_metrics(groups.gather(implicit), rewards.detach(), groups.present)
        return RPOOutput(group_losses.mean(), group_losses, logps, ref_logps, implicit, accuracy, margin)

    def _fused_loss(self, token_logps: Tensor, reference: "Reference", token_weights: Tensor | None) -> RPOOutput:
        assert isinstance(self.objective, RPO)
        loss, group_losses, logps, ref_logps, implicit, accuracy, margin = rpo_reduce(
            token_logps,
            self.labels,
            self.rewards.detach(),
            reference.sums,
            reference.tokens,
            token_weights,
            self.segments,
            self.groups,
            self.objective,
            self.ignore_index,
            self.shift,
        )
        given = reference.sums is not None or reference.tokens is not None
        return RPOOutput(loss, group_losses, logps, ref_logps if given else None, implicit, accuracy, margin)

    def _check_reference(self, ref_logps: Tensor | None, ref_token_logps: Tensor | None) -> "Reference":
        given = ref_logps is not None or ref_token_logps is not None
        if getattr(self.objective, "reference_free", False):
            if given:
                raise ValueError(
                    "the objective is reference-free: give neither ref_logps nor a reference model's output"
                )
            return Reference()
        if ref_token_logps is not None:
            return Reference(tokens=ref_token_logps.detach())
        per_sequence, per_token = [self.segments.count], list(self.labels.shape)
        if ref_logps is None:
            raise ValueError(
                f"ref_logps must be given, {per_sequence} sums or {per_token} per token, "
                "or the reference's logits or hidden states, unless the objective is reference-free"
            )
        check_tensor("ref_logps", ref_logps)
        check_device("ref_logps", ref_logps, self.labels.device, "the labels'")
        if per_sequence == per_token:
            raise ValueError(
                f"ref_logps of shape {per_sequence} could be sums or per token, as there are as many tokens as "
                "sequences: give the batch padded, [B, T], or the reference's logits or hidden states"
            )
        if list(ref_logps.shape) == per_sequence:
            return Reference(sums=ref_logps.detach())
        if list(ref_logps.shape) == per_token:
            return Reference(tokens=ref_logps.detach())
        raise ValueError(f"ref_logps must be sums {per_sequence} or per token {per_token}; got {list(ref_logps.shape)}")


class Reference(NamedTuple):
    """The reference's log-probabilities: one of the two, or neither."""

    sums: Tensor | None = None  # [B]
    tokens: Tensor | None = None  # of the labels' shape


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_token_weights(token_weights: Tensor, labels: Tensor) -> None:
    check_tensor("token_weights", token_weights, REAL)
    check_shape("token_weights", token_weights, labels.shape, "the labels' shape")
    check_device("token_weights", token_weights, labels.device, "the labels'")


def _check_rewards(rewards: Tensor, count: int, device: torch.device) -> None:
    check_tensor("rewards", rewards, REAL)
    if rewards.shape != (count,):
        raise ValueError(f"rewards must be one number for each of the {count} sequences; got {list(rewards.shape)}")
    check_device("rewards", rewards, device, "the other inputs'")
    if checks_values(rewards) and not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards must be finite; got {rewards.tolist()}")
