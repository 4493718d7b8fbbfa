"""`row_stats` in Triton: one pass over the rows of a tile of logits.

Each lane of a program keeps its own running (max, sum of exponentials), so the loop over the row holds no reduction
across lanes and no barrier: a block gives a lane VECTOR * STEPS columns, which cost one `exp2` each and one more
a block when the lane's maximum moves. Lanes are reduced once, at the end of the row, in a fixed order.

In the kernels `u = x`, or `tanh(inner * x)` with a softcap, and `z = outer * u`: working on differences of `u` keeps
the log-probability free of the rounding of `z`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import RowStats, TokenOptions
from .arithmetic import COARSE, LN2, LOG2E, LOWEST, squash
from .tiling import (
    INTEGERS,
    checked,
    choose_tiling,
    constants,
    count_blocks,
    edge_columns,
    processors,
    scales,
    vector_range,
)


def row_stats(
    logits: Tensor,
    labels: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    running: RowStats | None = None,
    outputs: tuple[str, ...] = (),
) -> RowStats:
    """`reference.row_stats` for float32, bfloat16 and float16 logits; one launch, two where rows are few.

    Rows may be strided; logits whose last stride is not 1 are copied.

    Raises:
        ValueError: for another dtype, or running statistics that are not contiguous.
    """
    logits = checked(logits)
    stats = RowStats.empty(labels, outputs) if running is None else _contiguous(running)
    if labels.numel() == 0:
        return stats
    columns = logits.shape[-1]
    tiling = choose_tiling(labels.numel(), columns, 16 // logits.itemsize, processors(logits))
    partial = None
    if tiling.splits > 1:
        fields = 6 if stats.outputs else 2
        partial = logits.new_empty((fields, tiling.splits, labels.numel()), dtype=torch.float32)
    scalars = (*labels.shape[1:], columns, first_column, options.ignore_index, *scales(options))
    flags = dict(SOFTCAP=options.softcap is not None, SHIFT=options.shift, RUNNING=running is not None)
    grid = (labels.numel(), tiling.splits)
    with torch.cuda.device_of(logits):
        row_stats_kernel[grid](
            *(logits, labels, stats, partial),
            *(logits.stride()[:2], labels.stride(), *scalars, count_blocks(columns, tiling)),
            **flags,
            **constants(tiling),
        )
        if partial is not None:
            combine_kernel[grid[:1]](
                *(logits, labels, stats, partial, logits.stride()[:2], labels.stride(), *scalars),
                **flags,
                SPLITS=tiling.splits,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return stats


@triton.jit(do_not_specialize=INTEGERS)
def row_stats_kernel(
    logits,  # [B, length, columns]
    labels,  # [B, length]
    stats,  # RowStats of contiguous [B, length]; fields that are None are not computed
    partial,  # [2 or 6, splits, B * length], or None without splits
    logits_strides,
    labels_strides,
    length,
    columns,
    first_column,
    ignore_index,
    inner,
    outer,
    blocks,  # a program reads this many blocks
    SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    RUNNING: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Program (position, split): statistics of the row that this label position reads, or of a part of it."""
    at = tl.program_id(0)
    split = tl.program_id(1)
    label, row = _label_and_row(logits, labels, logits_strides, labels_strides, at, length, ignore_index, SHIFT)
    if label == ignore_index:
        if split == 0:
            _store_unscored(stats, at)
        return

    head, end = vector_range(row, columns, VECTOR)
    body = tl.multiple_of(row + head, VECTOR * row.dtype.element_ty.primitive_bitwidth // 8)
    scale = outer * LOG2E
    column, inside = edge_columns(head, end, columns, split, VECTOR, LANES)
    edges = squash(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), inner, SOFTCAP)
    sum_z = tl.where(inside, edges, 0.0)
    edges = tl.where(inside, edges, float("-inf"))
    top = tl.maximum(edges, LOWEST)
    sumexp = tl.exp2((edges - top) * scale)
    sum_exp_z = tl.zeros_like(sumexp)
    sum_sq_exp = sumexp
    # In the label's block, the columns before the label are handled after the loop below.
    label_column = label.to(tl.int64) - first_column
    label_offset = (label_column - head).to(tl.int32)
    before = tl.where(column < label_column, edges, float("-inf"))

    BLOCK: tl.constexpr = VECTOR * LANES * STEPS
    offsets = tl.arange(0, BLOCK)
    start = split * blocks * BLOCK
    stop = tl.minimum(start + blocks * BLOCK, end - head)
    whole = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    for first in range(start, whole, BLOCK):
        x = tl.load(body + first + offsets, eviction_policy="evict_first").to(tl.float32)
        u = squash(x, inner, SOFTCAP)
        if stats.sum_z is not None:
            sum_z += _lane_sum(u, VECTOR, LANES, STEPS)
        if stats.max_before_label is not None:
            block_top = _lane_max(u, VECTOR, LANES, STEPS)
            before = tl.where(first + BLOCK <= label_offset, tl.maximum(before, block_top), before)
        top, sumexp, sum_exp_z, sum_sq_exp = _fold(
            stats, u, top, sumexp, sum_exp_z, sum_sq_exp, scale, VECTOR, LANES, STEPS
        )
    if whole < stop:
        here = offsets < stop - whole
        tail = tl.load(body + whole + offsets, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tail = squash(tail, inner, SOFTCAP)
        if stats.sum_z is not None:
            sum_z += _lane_sum(tl.where(here, tail, 0.0), VECTOR, LANES, STEPS)
        tail = tl.where(here, tail, float("-inf"))
        top, sumexp, sum_exp_z, sum_sq_exp = _fold(
            stats, tail, top, sumexp, sum_exp_z, sum_sq_exp, scale, VECTOR, LANES, STEPS
        )
    if stats.max_before_label is not None:
        last = tl.minimum(tl.maximum(label_offset, start), stop)
        first = start + tl.maximum(last - start, 0) // BLOCK * BLOCK
        here = offsets < last - first
        rest = squash(tl.load(body + first + offsets, mask=here, other=0.0).to(tl.float32), inner, SOFTCAP)
        rest = _lane_max(tl.where(here, rest, float("-inf")), VECTOR, LANES, STEPS)
        before = tl.maximum(before, rest)

    top, sumexp, sum_exp_z, sum_sq_exp = _reduce_lanes(stats, top, sumexp, sum_exp_z, sum_sq_exp, scale)
    sum_z = tl.sum(sum_z, axis=0)
    before = tl.max(before, axis=0)
    if partial is None:
        u_label = _label_u(row, label, first_column, columns, inner, SOFTCAP)
        finish_row(stats, at, u_label, top, sumexp, sum_exp_z, sum_sq_exp, sum_z, before, outer, RUNNING)
    else:
        slot = partial + split.to(tl.int64) * tl.num_programs(0) + at
        field = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        tl.store(slot, top)
        tl.store(slot + field, sumexp)
        if stats.sum_exp_z is not None:
            tl.store(slot + 2 * field, sum_exp_z)
        if stats.sum_sq_exp is not None:
            tl.store(slot + 3 * field, sum_sq_exp)
        if stats.sum_z is not None:
            tl.store(slot + 4 * field, sum_z)
        if stats.max_before_label is not None:
            tl.store(slot + 5 * field, before)


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(
    logits,
    labels,
    stats,
    partial,
    logits_strides,
    labels_strides,
    length,
    columns,
    first_column,
    ignore_index,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    RUNNING: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (position): the row's statistics from those of its splits, in the splits' order."""
    at = tl.program_id(0)
    label, row = _label_and_row(logits, labels, logits_strides, labels_strides, at, length, ignore_index, SHIFT)
    if label == ignore_index:
        return
    slots = partial + tl.arange(0, SPLITS).to(tl.int64) * tl.num_programs(0) + at
    field = tl.num_programs(0).to(tl.int64) * SPLITS
    top = tl.load(slots)
    sumexp = tl.load(slots + field)
    sum_exp_z = tl.load(slots + 2 * field) if stats.sum_exp_z is not None else sumexp
    sum_sq_exp = tl.load(slots + 3 * field) if stats.sum_sq_exp is not None else sumexp
    sum_z = tl.load(slots + 4 * field) if stats.sum_z is not None else sumexp
    before = tl.load(slots + 5 * field) if stats.max_before_label is not None else sumexp
    top, sumexp, sum_exp_z, sum_sq_exp = _reduce_lanes(stats, top, sumexp, sum_exp_z, sum_sq_exp, outer * LOG2E)
    u_label = _label_u(row, label, first_column, columns, inner, SOFTCAP)
    sum_z = tl.sum(sum_z, axis=0)
    before = tl.max(before, axis=0)
    finish_row(stats, at, u_label, top, sumexp, sum_exp_z, sum_sq_exp, sum_z, before, outer, RUNNING)


@triton.jit
def _label_and_row(logits, labels, logits_strides, labels_strides, at, length, ignore_index, SHIFT: tl.constexpr):
    """The label at a flat position, ignore_index if no row predicts it, and the row that does."""
    batch = at.to(tl.int64) // length
    position = at.to(tl.int64) % length
    t = position - 1 if SHIFT else position
    label = tl.load(labels + batch * labels_strides[0] + position * labels_strides[1], mask=t >= 0, other=ignore_index)
    return label, logits + batch * logits_strides[0] + t * logits_strides[1]


@triton.jit
def _fold(
    stats, u, top, sumexp, sum_exp_z, sum_sq_exp, scale,
    VECTOR: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Fold a block [STEPS * LANES * VECTOR] into each lane's statistics; `scale` takes differences of u to bits."""
    u = tl.reshape(u, [STEPS, LANES, VECTOR])
    new_top = tl.maximum(top, tl.max(tl.max(u, axis=2), axis=0))
    away = (u - new_top[None, :, None]) * scale
    weights = tl.exp2(away)
    sumexp, sum_exp_z, sum_sq_exp = _lower(stats, sumexp, sum_exp_z, sum_sq_exp, (top - new_top) * scale)
    sumexp += tl.sum(tl.sum(weights, axis=2), axis=0)
    if stats.sum_exp_z is not None:
        terms = weights * tl.maximum(away, -1e4)  # finite, so that 0 times it is 0
        sum_exp_z += tl.sum(tl.sum(terms, axis=2), axis=0)
    if stats.sum_sq_exp is not None:
        sum_sq_exp += tl.sum(tl.sum(weights * weights, axis=2), axis=0)
    return new_top, sumexp, sum_exp_z, sum_sq_exp


@triton.jit
def _lane_sum(u, VECTOR: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(u, [STEPS, LANES, VECTOR]), axis=2), axis=0)


@triton.jit
def _lane_max(u, VECTOR: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    return tl.max(tl.max(tl.reshape(u, [STEPS, LANES, VECTOR]), axis=2), axis=0)


@triton.jit
def _lower(stats, sumexp, sum_exp_z, sum_sq_exp, bits):
    """Sums of 2^a, 2^a * a and 4^a once `bits` (<= 0, or a rounding error) is added to every a."""
    factor = tl.exp2(bits)
    if stats.sum_exp_z is not None:
        sum_exp_z = tl.where(factor > 0, (sum_exp_z + sumexp * bits) * factor, 0.0)
    if stats.sum_sq_exp is not None:
        sum_sq_exp = sum_sq_exp * factor * factor
    return sumexp * factor, sum_exp_z, sum_sq_exp


@triton.jit
def _reduce_lanes(stats, top, sumexp, sum_exp_z, sum_sq_exp, scale):
    """One row's statistics from its lanes'."""
    row_top = tl.max(top, axis=0)
    sumexp, sum_exp_z, sum_sq_exp = _lower(stats, sumexp, sum_exp_z, sum_sq_exp, (top - row_top) * scale)
    return row_top, tl.sum(sumexp, axis=0), tl.sum(sum_exp_z, axis=0), tl.sum(sum_sq_exp, axis=0)


@triton.jit
def _label_u(row, label, first_column, columns, inner, SOFTCAP: tl.constexpr):
    column = label.to(tl.int64) - first_column
    inside = (column >= 0) & (column < columns)
    u = squash(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), inner, SOFTCAP)
    return tl.where(inside, u, float("-inf"))


@triton.jit
def finish_row(stats, at, u_label, top, sumexp, sum_exp_z, sum_sq_exp, sum_z, before, outer, RUNNING: tl.constexpr):
    """Turn a row's statistics in u and bits into RowStats, merge them with the running ones, and store."""
    label_logit = u_label * outer
    logp = (u_label - top) * outer - tl.log(sumexp)
    z_top = top * outer
    # sumexp is relative to the exact maximum; rescale it to the rounded one that is stored, unless that overflows.
    rounding = tl.where((sumexp > 0) & (tl.abs(z_top) < COARSE), tl.fma(top, outer, -z_top), 0.0)
    sumexp, sum_exp_z, sum_sq_exp = _lower(stats, sumexp, sum_exp_z, sum_sq_exp, rounding * LOG2E)
    z_top = tl.where(sumexp == 0, float("-inf"), z_top)
    if RUNNING:
        old_top = tl.load(stats.max + at)
        new_top = tl.maximum(old_top, z_top)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        old_sumexp = tl.load(stats.sumexp + at)
        old_sum_exp_z = tl.load(stats.sum_exp_z + at) * LOG2E if stats.sum_exp_z is not None else sum_exp_z
        old_sum_sq_exp = tl.load(stats.sum_sq_exp + at) if stats.sum_sq_exp is not None else sum_sq_exp
        old_sumexp, old_sum_exp_z, old_sum_sq_exp = _lower(
            stats, old_sumexp, old_sum_exp_z, old_sum_sq_exp, (old_top - finite) * LOG2E
        )
        sumexp, sum_exp_z, sum_sq_exp = _lower(stats, sumexp, sum_exp_z, sum_sq_exp, (z_top - finite) * LOG2E)
        sumexp += old_sumexp
        sum_exp_z += old_sum_exp_z
        sum_sq_exp += old_sum_sq_exp
        z_top = new_top
        label_logit = tl.maximum(label_logit, tl.load(stats.label_logit + at))
        logp = (label_logit - z_top) - tl.log(sumexp)
    # The maximum ignores NaN, the sum does not.
    z_top = tl.where((sumexp != sumexp) & (z_top < float("inf")), sumexp, z_top)
    tl.store(stats.logp + at, logp)
    tl.store(stats.max + at, z_top)
    tl.store(stats.sumexp + at, sumexp)
    tl.store(stats.label_logit + at, label_logit)
    if stats.sum_exp_z is not None:
        tl.store(stats.sum_exp_z + at, sum_exp_z * LN2)
    if stats.sum_sq_exp is not None:
        tl.store(stats.sum_sq_exp + at, sum_sq_exp)
    if stats.sum_z is not None:
        sum_z *= outer
        tl.store(stats.sum_z + at, sum_z + tl.load(stats.sum_z + at) if RUNNING else sum_z)
    if stats.max_before_label is not None:
        before *= outer
        tl.store(
            stats.max_before_label + at, tl.maximum(before, tl.load(stats.max_before_label + at)) if RUNNING else before
        )


@triton.jit
def _store_unscored(stats, at):
    tl.store(stats.logp + at, 0.0)
    tl.store(stats.max + at, 0.0)
    tl.store(stats.sumexp + at, 1.0)
    tl.store(stats.label_logit + at, 0.0)
    if stats.sum_exp_z is not None:
        tl.store(stats.sum_exp_z + at, 0.0)
    if stats.sum_sq_exp is not None:
        tl.store(stats.sum_sq_exp + at, 1.0)
    if stats.sum_z is not None:
        tl.store(stats.sum_z + at, 0.0)
    if stats.max_before_label is not None:
        tl.store(stats.max_before_label + at, 0.0)


def _contiguous(running: RowStats) -> RowStats:
    if not all(x.is_contiguous() for x in running if x is not None):
        raise ValueError(f"running must be contiguous to be continued in place; got strides {running.logp.stride()}")
    return running
