"""Sequence sums, the RPO family's objective, its gradient and its metrics, in one launch of one Triton program.

The program loops over blocks of sequences, stores their sums, and after a barrier loops over blocks of groups. One
program is enough: it reads a dozen bytes per token, the pass over the logits a whole row of the vocabulary. All sums
have a fixed order.
"""

import math
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 8
TOKENS_IN_BLOCK = 2048
RESPONSES_IN_BLOCK = 1024
INTEGERS = ["num_sequences", "length", "num_groups", "size", "group_stride", "response_stride", "ignore_index"]


class GroupLayout(Protocol):
    """Indices of the responses of each group, `[count, size]`; `sequences.Groups` implements it.

    Response k of group g is sequence `g * group_stride + k * response_stride`, or `index[g, k]`, -1 for none.
    """

    @property
    def count(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def group_stride(self) -> int: ...
    @property
    def response_stride(self) -> int: ...
    @property
    def index(self) -> Tensor | None: ...


class Family(Protocol):
    """The constants of the objective; `objectives.RPO` implements it and documents them."""

    @property
    def distance(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def eta(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def target_margin(self) -> float | None: ...
    @property
    def length_normalize(self) -> bool: ...


class SequenceReduction(NamedTuple):
    """float32 on the log-probabilities' device; sequences in the batch's order."""

    loss: Tensor  # scalar: mean of group_losses
    group_losses: Tensor  # [G]
    logps: Tensor  # [B]
    ref_logps: Tensor  # [B], 0 without a reference
    implicit_rewards: Tensor  # [B] beta * log-ratio
    accuracy: Tensor  # scalar, as objectives.ranking_metrics
    margin: Tensor  # scalar, as objectives.ranking_metrics
    coef: Tensor  # [B] d loss / d logps


class Tokens(NamedTuple):
    """Per-token inputs, `[B, T]` or packed `[total]`; the last dimension contiguous."""

    logps: Tensor
    labels: Tensor
    ref_logps: Tensor | None
    weights: Tensor | None


def sequence_reduce(
    token_logps: Tensor,
    labels: Tensor,
    rewards: Tensor,
    groups: GroupLayout,
    objective: Family,
    *,
    ref_sums: Tensor | None = None,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> SequenceReduction:
    """From the log-probabilities of tokens to the loss of the RPO family and its gradient.

    Args:
        token_logps: `[B, T]`, or `[total]` with `cu_seqlens`; float32.
        labels: of that shape; tokens at `ignore_index` are not summed, nor are first tokens if `shift`.
        rewards: `[B]`, compared in their own type; one that is not finite makes its group's loss NaN.
        ref_sums, ref_logps: the reference's, sums `[B]` or per token in the labels' shape; neither for no reference.
        token_weights: of the labels' shape.
        cu_seqlens: `[B + 1]` int32 or int64 offsets of packed sequences.

    Per-token tensors whose last stride is not 1 are copied.
    """
    num_sequences = rewards.shape[0]
    tokens = Tokens(
        _unit_stride(token_logps),
        _unit_stride(labels),
        None if ref_logps is None else _unit_stride(ref_logps),
        None if token_weights is None else _unit_stride(token_weights),
    )
    out = SequenceReduction(
        *(token_logps.new_empty(shape, dtype=torch.float32) for shape in _output_shapes(num_sequences, groups.count))
    )
    lengths = torch.empty_like(out.logps) if objective.length_normalize else None
    # Without cu_seqlens, a sequence starts at its row; with them, at its offset.
    strides = tuple(0 if x is None or cu_seqlens is not None else x.stride(0) for x in tokens)
    length = labels.shape[-1] if cu_seqlens is None else -(-labels.numel() // max(num_sequences, 1))
    with torch.cuda.device_of(token_logps):
        sequence_reduce_kernel[(1,)](
            *(tokens, strides, None if ref_sums is None else ref_sums.contiguous()),
            *(None if cu_seqlens is None else cu_seqlens.contiguous(), rewards.contiguous()),
            *(None if groups.index is None else groups.index.contiguous(), lengths, out),
            *(num_sequences, length, groups.count, groups.size, groups.group_stride, groups.response_stride),
            *(ignore_index, objective.beta, objective.eta, objective.gamma, _finite(objective.target_margin)),
            DISTANCE=objective.distance,
            TARGET=_target(objective.target_margin),
            SHIFT=shift,
            **choose_blocks(num_sequences, length, groups.count, groups.size),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out


def choose_blocks(num_sequences: int, length: int, num_groups: int, size: int) -> dict[str, int]:
    """Block shapes `[SEQUENCES, TOKENS]` and `[GROUPS, RESPONSES]`, powers of two."""
    tokens = min(triton.next_power_of_2(max(length, 1)), TOKENS_IN_BLOCK // 8)
    sequences = min(triton.next_power_of_2(max(num_sequences, 1)), TOKENS_IN_BLOCK // tokens)
    responses = triton.next_power_of_2(size)
    groups = min(triton.next_power_of_2(max(num_groups, 1)), max(RESPONSES_IN_BLOCK // responses, 1))
    return dict(SEQUENCES=sequences, TOKENS=tokens, GROUPS=groups, RESPONSES=responses)


@triton.jit(do_not_specialize=INTEGERS)
def sequence_reduce_kernel(
    tokens,  # Tokens
    strides,  # from row to row of each of tokens, 0 where packed
    ref_sums,  # [B], or None
    cu_seqlens,  # [B + 1], or None
    rewards,  # [B]
    index,  # [G, K], or None
    lengths,  # [B] scratch if log-ratios are divided by the length, else None
    out,  # SequenceReduction
    num_sequences,
    length,
    num_groups,
    size,
    group_stride,
    response_stride,
    ignore_index,
    beta,
    eta,
    gamma,
    target_margin,
    DISTANCE: tl.constexpr,
    TARGET: tl.constexpr,
    SHIFT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    RESPONSES: tl.constexpr,
):
    for first in range(0, num_sequences, SEQUENCES):
        sequence = first + tl.arange(0, SEQUENCES)
        exists = sequence < num_sequences
        logps, refs, scored = _sum_tokens(
            tokens, strides, cu_seqlens, sequence, exists, length, ignore_index, SHIFT, SEQUENCES, TOKENS
        )
        if ref_sums is not None:
            refs = tl.load(ref_sums + sequence, mask=exists, other=0.0).to(tl.float32)
        implicit = (logps - refs) * beta
        if lengths is not None:
            scored = tl.maximum(scored, 1.0)
            implicit /= scored
            tl.store(lengths + sequence, scored, mask=exists)
        tl.store(out.logps + sequence, logps, mask=exists)
        tl.store(out.ref_logps + sequence, refs, mask=exists)
        tl.store(out.implicit_rewards + sequence, implicit, mask=exists)
        tl.store(out.coef + sequence, 0.0, mask=exists)  # stays for a sequence that is in no group
    tl.debug_barrier()

    response = tl.arange(0, RESPONSES)[None, :]
    losses = tl.zeros([GROUPS], tl.float32)
    spreads = tl.zeros([GROUPS], tl.float32)
    ranked = tl.zeros([GROUPS], tl.int32)
    pairs = tl.zeros([GROUPS, RESPONSES], tl.int32)
    halves = tl.zeros([GROUPS, RESPONSES], tl.int32)  # two for a pair in order, one for a tie
    for first in range(0, num_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        present = (group < num_groups)[:, None] & (response < size)
        if index is None:
            sequence = group[:, None] * group_stride + response * response_stride
        else:
            sequence = tl.load(index + group[:, None].to(tl.int64) * size + response, mask=present, other=-1)
            present = present & (sequence >= 0)
        implicit = tl.load(out.implicit_rewards + sequence, mask=present, other=0.0)
        reward = _comparable(tl.load(rewards + sequence, mask=present, other=0))
        loss, coef = _objective(implicit, reward, present, eta, gamma, target_margin, DISTANCE, TARGET)
        coef *= beta / num_groups
        if lengths is not None:
            coef /= tl.load(lengths + sequence, mask=present, other=1.0)
        tl.store(out.group_losses + group, loss, mask=group < num_groups)
        tl.store(out.coef + sequence, coef, mask=present)
        losses += loss

        best = tl.max(tl.where(present, reward, float("-inf")), axis=1)
        worst = tl.min(tl.where(present, reward, float("inf")), axis=1)
        spread = _pick_first(implicit, present & (reward == best[:, None]), response, RESPONSES)
        spread -= _pick_first(implicit, present & (reward == worst[:, None]), response, RESPONSES)
        spreads += tl.where(best > worst, spread, 0.0)
        ranked += (best > worst).to(tl.int32)
        for other in range(0, size):
            chosen = response == other
            pair = (
                present & (reward > _pick(reward, chosen)[:, None]) & (_pick(present.to(tl.int32), chosen)[:, None] > 0)
            )
            lead = implicit - _pick(implicit, chosen)[:, None]
            pairs += pair.to(tl.int32)
            halves += tl.where(pair & (lead > 0), 2, tl.where(pair & (lead == 0), 1, 0))

    tl.store(out.loss, tl.sum(losses, axis=0) / num_groups)
    tl.store(out.margin, tl.sum(spreads, axis=0) / tl.sum(ranked, axis=0))
    all_pairs = tl.sum(tl.sum(pairs, axis=1), axis=0)
    tl.store(out.accuracy, 0.5 * tl.sum(tl.sum(halves, axis=1), axis=0).to(tl.float32) / all_pairs)


@triton.jit
def _sum_tokens(
    tokens, strides, cu_seqlens, sequence, exists, length, ignore_index,
    SHIFT: tl.constexpr, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Weighted sums of a block of sequences: the policy's, the reference's, and the number of scored tokens."""
    if cu_seqlens is None:
        start = tl.zeros([SEQUENCES], tl.int64)
        count = tl.where(exists, length, 0)
    else:
        start = tl.load(cu_seqlens + sequence, mask=exists, other=0).to(tl.int64)
        count = (tl.load(cu_seqlens + sequence + 1, mask=exists, other=0) - start).to(tl.int32)
    row = sequence.to(tl.int64)
    logps = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    refs = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    scored = tl.zeros([SEQUENCES, TOKENS], tl.float32)
    for first in range(0, tl.max(count, axis=0), TOKENS):
        t = first + tl.arange(0, TOKENS)[None, :]
        at = start[:, None] + t
        inside = t < count[:, None]
        label = tl.load(tokens.labels + row[:, None] * strides[1] + at, mask=inside, other=ignore_index)
        counts = inside & (label != ignore_index)
        if SHIFT:
            counts = counts & (t > 0)
        logp = tl.load(tokens.logps + row[:, None] * strides[0] + at, mask=inside, other=0.0).to(tl.float32)
        weight = counts.to(tl.float32)
        scored += weight
        if tokens.weights is not None:
            weight = tl.load(tokens.weights + row[:, None] * strides[3] + at, mask=inside, other=0.0).to(tl.float32)
        logps += tl.where(counts, weight * logp, 0.0)
        if tokens.ref_logps is not None:
            ref = tl.load(tokens.ref_logps + row[:, None] * strides[2] + at, mask=inside, other=0.0).to(tl.float32)
            refs += tl.where(counts, weight * ref, 0.0)
    return tl.sum(logps, axis=1), tl.sum(refs, axis=1), tl.sum(scored, axis=1)


@triton.jit
def _comparable(reward):
    """Rewards in a dtype that represents them exactly and has an infinity."""
    if reward.dtype == tl.float64 or reward.dtype.is_int():
        return reward.to(tl.float64)
    return reward.to(tl.float32)


@triton.jit
def _objective(a, reward, present, eta, gamma, target_margin, DISTANCE: tl.constexpr, TARGET: tl.constexpr):
    """Losses `[GROUPS]` and their gradient in `a` `[GROUPS, RESPONSES]`; 0 for groups of one response or none."""
    # A reward that is not finite makes the loss NaN: x - x is NaN for it and 0 for any other.
    unsound = tl.sum(tl.where(present, reward - reward, 0.0), axis=1).to(tl.float32)
    top = tl.max(tl.where(present, reward, float("-inf")), axis=1)[:, None]
    best = present & (reward == top)
    # Only differences within a group matter: they are accurate in float32 even if the rewards are not.
    reward = tl.where(present, reward - top, 0.0).to(tl.float32)
    a -= tl.where(best, gamma, 0.0)
    if TARGET == "rewards":
        b = eta * reward
    else:
        b = tl.where(best, target_margin, 0.0)
    if DISTANCE == "sq":
        # d_k minus the others' mean is K / (K - 1) (d_k - mean d).
        size = tl.sum(present.to(tl.float32), axis=1)
        others = tl.maximum(size - 1.0, 1.0)
        d = tl.where(present, a - b, 0.0)
        d = tl.where(present, d - (tl.sum(d, axis=1) / tl.maximum(size, 1.0))[:, None], 0.0)
        loss = tl.sum(d * d, axis=1) * size / (2.0 * others * others)
        grad = d * (size / (others * others))[:, None]
    else:
        p, log_p = _softmax(a, present)
        if TARGET == "one_hot":
            ties = tl.sum(best.to(tl.float32), axis=1)[:, None]
            q = tl.where(best, 1.0 / ties, 0.0)
            log_q = tl.where(best, -tl.log(ties), 0.0)
        else:
            q, log_q = _softmax(b, present)
        if DISTANCE == "bwd_kl":
            loss = _kl(q, log_q, log_p)
            grad = p - q
        else:
            loss = _kl(p, log_p, log_q)
            grad = tl.where(p == 0, 0.0, p * (log_p - log_q - loss[:, None]))
    return loss + unsound, grad + unsound[:, None]


@triton.jit
def _softmax(x, present):
    """softmax and log-softmax over each group's responses, 0 for absent ones."""
    away = tl.where(present, x - tl.max(tl.where(present, x, float("-inf")), axis=1)[:, None], float("-inf"))
    log_sum = tl.log(tl.sum(tl.exp(away), axis=1))[:, None]
    log_p = tl.where(present, away - log_sum, 0.0)
    return tl.where(present, tl.exp(log_p), 0.0), log_p


@triton.jit
def _kl(p, log_p, log_q):
    """sum_k p_k (log p_k - log q_k), where 0 log 0 = 0."""
    return tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), axis=1)


@triton.jit
def _pick(x, chosen):
    """The one chosen response's value in each group."""
    return tl.sum(tl.where(chosen, x, tl.zeros_like(x)), axis=1)


@triton.jit
def _pick_first(x, eligible, response, RESPONSES: tl.constexpr):
    """The first eligible response's value in each group."""
    first = tl.min(tl.where(eligible, response, RESPONSES), axis=1)
    return _pick(x, response == first[:, None])


def _output_shapes(num_sequences: int, num_groups: int) -> list[tuple[int, ...]]:
    special = dict(loss=(), accuracy=(), margin=(), group_losses=(num_groups,))
    return [special.get(name, (num_sequences,)) for name in SequenceReduction._fields]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _target(target_margin: float | None) -> str:
    if target_margin is None:
        return "rewards"
    return "one_hot" if target_margin == math.inf else "margin"


def _finite(target_margin: float | None) -> float:
    return 0.0 if target_margin is None or target_margin == math.inf else target_margin
