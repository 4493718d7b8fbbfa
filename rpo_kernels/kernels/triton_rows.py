"""The row kernels in Triton, for CUDA and ROCm devices; under TRITON_INTERPRET=1 also for the CPU.

How a row is read. Each lane of the program keeps its own running (max, sum of exponentials), so the loop over the row
holds no reduction across lanes and no barrier: a block gives a lane VECTOR * STEPS columns, which cost one `exp2` each
and one more a block when the lane's maximum moves. Lanes are reduced once, at the end of the row, in a fixed order.
Columns are counted from the first 16-byte boundary in the row, so loads stay 16 bytes wide whatever the row's
address; the few columns before it and after the last whole vector are the *edges*, one to a lane.

In the kernels `u = x`, or `tanh(inner * x)` with a softcap, and `z = outer * u`: working on differences of `u` keeps
the log-probability free of the rounding of `z`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import ActiveColumns, RowStats, TokenOptions

NUM_WARPS = 4
LANES = NUM_WARPS * (64 if torch.version.hip else 32)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every finite float32, so that a lane that saw nothing but -inf needs no special case: -inf minus it is -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = ["length", "columns", "first_column", "ignore_index", "blocks"]


class Tiling(NamedTuple):
    """How a kernel walks a row: `lanes * steps` vectors of `vector` columns a block, blocks shared by `splits`."""

    vector: int
    lanes: int
    steps: int
    splits: int


def choose_tiling(rows: int, columns: int, vector: int, processors: int) -> Tiling:
    """Blocks of four vectors a lane; several programs a row only where rows alone would leave processors idle."""
    vectors = triton.cdiv(columns, vector)
    steps = min(4, triton.next_power_of_2(triton.cdiv(vectors, LANES)))
    blocks = triton.cdiv(vectors, LANES * steps)
    splits = 1
    if rows < 4 * processors:
        splits = min(triton.next_power_of_2(triton.cdiv(8 * processors, rows)), triton.next_power_of_2(blocks))
    return Tiling(vector, LANES, steps, splits)


def row_stats(
    logits: Tensor,
    labels: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    running: RowStats | None = None,
    extras: bool = False,
) -> RowStats:
    """`definition.row_stats` for float32, bfloat16 and float16 logits; one launch, two where rows are few.

    Rows may be strided; logits whose last stride is not 1 are copied.

    Raises:
        ValueError: for another dtype, or running statistics that are not contiguous.
    """
    logits = _checked(logits)
    extras = running.total is not None if running is not None else extras
    stats = _empty_stats(labels, extras) if running is None else _contiguous(running)
    if labels.numel() == 0:
        return stats
    columns = logits.shape[-1]
    tiling = choose_tiling(labels.numel(), columns, 16 // logits.itemsize, _processors(logits))
    partial = None
    if tiling.splits > 1:
        fields = 4 if extras else 2
        partial = logits.new_empty((fields, tiling.splits, labels.numel()), dtype=torch.float32)
    scalars = (*labels.shape[1:], columns, first_column, options.ignore_index, *_scales(options))
    flags = dict(SOFTCAP=options.softcap is not None, SHIFT=options.shift, EXTRAS=extras, RUNNING=running is not None)
    grid = (labels.numel(), tiling.splits)
    with torch.cuda.device_of(logits):
        row_stats_kernel[grid](
            *(logits, labels, stats, partial),
            *(logits.stride()[:2], labels.stride(), *scalars, _blocks(columns, tiling)),
            **flags,
            **_constants(tiling),
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


def row_grad(
    logits: Tensor,
    labels: Tensor,
    stats: RowStats,
    grad_logps: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    out: Tensor | None = None,
    active: ActiveColumns | None = None,
) -> Tensor:
    """`definition.row_grad` for float32, bfloat16 and float16 logits and `out`; one launch.

    Rows of `logits` and `out` may be strided, `grad_logps` may have any strides. Loads and stores are 16 bytes wide
    where rows of the two tensors are equally far from a boundary, narrower where not. An `out` whose last stride is not
    1 is written by way of a copy.

    Raises:
        ValueError: for another dtype, or an `out` of another shape.
    """
    source = _checked(logits)
    if out is None:
        out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if out.shape != source.shape or out.dtype not in _DTYPES:
        raise ValueError(
            f"out must be float32, bfloat16 or float16 of shape {list(source.shape)}; "
            f"got {out.dtype} of shape {list(out.shape)}"
        )
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return out.copy_(row_grad(source, labels, stats, grad_logps, options, first_column, dense, active))
    if out.numel() == 0:
        return out
    columns = source.shape[-1]
    tiling = choose_tiling(labels.numel(), columns, _common_vector(source, out), _processors(source))
    logps, tops, sumexps = (x.contiguous() for x in stats[:3])
    with torch.cuda.device_of(source):
        row_grad_kernel[(labels.numel(), tiling.splits)](
            *(source, out, None if active is None else active.mask, labels, logps, tops, sumexps, grad_logps),
            *(source.stride()[:2], out.stride()[:2], labels.stride(), grad_logps.stride()),
            *(*labels.shape[1:], columns, first_column, options.ignore_index, *_scales(options)),
            _blocks(columns, tiling),
            0.0 if active is None else active.threshold,
            SOFTCAP=options.softcap is not None,
            SHIFT=options.shift,
            **_constants(tiling),
        )
    return out


@triton.jit(do_not_specialize=INTEGERS)
def row_stats_kernel(
    logits,  # [B, length, columns]
    labels,  # [B, length]
    stats,  # RowStats of contiguous [B, length]
    partial,  # [2 or 4, splits, B * length], or None without splits
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
    EXTRAS: tl.constexpr,
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
            _store_unscored(stats, at, EXTRAS)
        return

    head, end = _vector_range(row, columns, VECTOR)
    body = tl.multiple_of(row + head, VECTOR * row.dtype.element_ty.primitive_bitwidth // 8)
    scale = outer * LOG2E
    column, inside = _edges(head, end, columns, split, VECTOR, LANES)
    edges = _squash(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), inner, SOFTCAP)
    total = tl.where(inside, edges, 0.0)
    edges = tl.where(inside, edges, float("-inf"))
    top = tl.maximum(edges, LOWEST)
    sumexp = tl.exp2((edges - top) * scale)
    weighted = tl.zeros_like(sumexp)

    BLOCK: tl.constexpr = VECTOR * LANES * STEPS
    offsets = tl.arange(0, BLOCK)
    start = split * blocks * BLOCK
    stop = tl.minimum(start + blocks * BLOCK, end - head)
    whole = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    for first in range(start, whole, BLOCK):
        x = tl.load(body + first + offsets, eviction_policy="evict_first").to(tl.float32)
        u = _squash(x, inner, SOFTCAP)
        if EXTRAS:
            total += _lane_sum(u, VECTOR, LANES, STEPS)
        top, sumexp, weighted = _fold(u, top, sumexp, weighted, scale, EXTRAS, VECTOR, LANES, STEPS)
    if whole < stop:
        here = offsets < stop - whole
        tail = tl.load(body + whole + offsets, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tail = _squash(tail, inner, SOFTCAP)
        if EXTRAS:
            total += _lane_sum(tl.where(here, tail, 0.0), VECTOR, LANES, STEPS)
        tail = tl.where(here, tail, float("-inf"))
        top, sumexp, weighted = _fold(tail, top, sumexp, weighted, scale, EXTRAS, VECTOR, LANES, STEPS)

    top, sumexp, weighted, total = _reduce_lanes(top, sumexp, weighted, total, scale, EXTRAS)
    if partial is None:
        u_label = _label_u(row, label, first_column, columns, inner, SOFTCAP)
        _finish(stats, at, u_label, top, sumexp, weighted, total, outer, RUNNING, EXTRAS)
    else:
        slot = partial + split.to(tl.int64) * tl.num_programs(0) + at
        field = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        tl.store(slot, top)
        tl.store(slot + field, sumexp)
        if EXTRAS:
            tl.store(slot + 2 * field, weighted)
            tl.store(slot + 3 * field, total)


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
    EXTRAS: tl.constexpr,
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
    weighted = tl.zeros_like(sumexp)
    total = tl.zeros_like(sumexp)
    if EXTRAS:
        weighted = tl.load(slots + 2 * field)
        total = tl.load(slots + 3 * field)
    top, sumexp, weighted, total = _reduce_lanes(top, sumexp, weighted, total, outer * LOG2E, EXTRAS)
    u_label = _label_u(row, label, first_column, columns, inner, SOFTCAP)
    _finish(stats, at, u_label, top, sumexp, weighted, total, outer, RUNNING, EXTRAS)


@triton.jit(do_not_specialize=INTEGERS)
def row_grad_kernel(
    logits,  # [B, length, columns]
    out,  # [B, length, columns], may be logits
    active,  # [columns] uint8, or None
    labels,  # [B, length], as the four below; the next three contiguous
    logps,
    tops,
    sumexps,
    grad_logps,
    logits_strides,
    out_strides,
    labels_strides,
    grad_strides,
    length,
    columns,
    first_column,
    ignore_index,
    inner,
    outer,
    blocks,
    threshold,
    SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Program (row, split): the gradient of the label position that reads this row, or of a part of the columns."""
    batch = tl.program_id(0).to(tl.int64) // length
    t = tl.program_id(0).to(tl.int64) % length
    split = tl.program_id(1)
    position = t + 1 if SHIFT else t
    label = tl.load(
        labels + batch * labels_strides[0] + position * labels_strides[1], mask=position < length, other=ignore_index
    )
    row = logits + batch * logits_strides[0] + t * logits_strides[1]
    out_row = out + batch * out_strides[0] + t * out_strides[1]

    head, end = _vector_range(row, columns, VECTOR)
    body = tl.multiple_of(row + head, VECTOR * row.dtype.element_ty.primitive_bitwidth // 8)
    out_body = tl.multiple_of(out_row + head, VECTOR * out.dtype.element_ty.primitive_bitwidth // 8)
    column, inside = _edges(head, end, columns, split, VECTOR, LANES)
    BLOCK: tl.constexpr = VECTOR * LANES * STEPS
    offsets = tl.arange(0, BLOCK)
    start = split * blocks * BLOCK
    stop = tl.minimum(start + blocks * BLOCK, end - head)

    if label == ignore_index:
        zeros = tl.zeros([BLOCK], out.dtype.element_ty)
        tl.store(out_row + column, tl.zeros([LANES], out.dtype.element_ty), mask=inside)
        for first in range(start, stop, BLOCK):
            tl.store(out_body + first + offsets, zeros, mask=offsets < stop - first)
        return

    at = batch * length + position
    top = tl.load(tops + at)
    factor = tl.load(grad_logps + batch * grad_strides[0] + position * grad_strides[1]).to(tl.float32) * outer
    if SOFTCAP:
        factor *= inner
    # What a column's exponential, and the label's column, are multiplied by before the softcap's derivative.
    others = -factor / tl.load(sumexps + at)
    own = -_expm1(tl.load(logps + at)) * factor
    label_column = label.to(tl.int64) - first_column

    edges = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    edges = _grad(edges, column, label_column, top, others, own, inner, outer, SOFTCAP)
    tl.store(out_row + column, edges.to(out.dtype.element_ty), mask=inside)
    if active is not None:
        tl.store(active + column, 1, mask=inside & _exceeds(edges, threshold))
    # Whole blocks but the label's: no masks, no comparing of columns. Then the label's block and the partial one.
    label_offset = (label_column - head).to(tl.int32)
    whole = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    holds_label = (label_offset >= start) & (label_offset < whole)
    special = tl.where(holds_label, label_offset // BLOCK * BLOCK, whole)
    for i in range(start, tl.where(holds_label, whole - BLOCK, whole), BLOCK):
        first = i + tl.where(i >= special, BLOCK, 0)
        x = tl.load(body + first + offsets, eviction_policy="evict_first").to(tl.float32)
        grad = _grad(x, None, None, top, others, own, inner, outer, SOFTCAP)
        tl.store(out_body + first + offsets, grad.to(out.dtype.element_ty))
        if active is not None:
            tl.store(active + head + first + offsets, 1, mask=_exceeds(grad, threshold))
    for first in range(special, stop, tl.where(special < whole, whole - special, BLOCK)):
        here = offsets < stop - first
        x = tl.load(body + first + offsets, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        grad = _grad(x, offsets, label_offset - first, top, others, own, inner, outer, SOFTCAP)
        tl.store(out_body + first + offsets, grad.to(out.dtype.element_ty), mask=here)
        if active is not None:
            tl.store(active + head + first + offsets, 1, mask=here & _exceeds(grad, threshold))


@triton.jit
def _label_and_row(logits, labels, logits_strides, labels_strides, at, length, ignore_index, SHIFT: tl.constexpr):
    """The label at a flat position, ignore_index if no row predicts it, and the row that does."""
    batch = at.to(tl.int64) // length
    position = at.to(tl.int64) % length
    t = position - 1 if SHIFT else position
    label = tl.load(labels + batch * labels_strides[0] + position * labels_strides[1], mask=t >= 0, other=ignore_index)
    return label, logits + batch * logits_strides[0] + t * logits_strides[1]


@triton.jit
def _vector_range(row, columns, VECTOR: tl.constexpr):
    """Columns [head, end) of a row that make whole vectors at aligned addresses."""
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    past = (row.to(tl.int64) // SIZE % VECTOR).to(tl.int32)
    head = tl.minimum((VECTOR - past) % VECTOR, columns)
    return head, head + (columns - head) // VECTOR * VECTOR


@triton.jit
def _edges(head, end, columns, split, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Columns outside [head, end), at most one a lane, and which lanes have one; they belong to the first split."""
    lane = tl.arange(0, LANES)
    column = tl.where(lane < head, lane, end + lane - head)
    return column, lane < tl.where(split == 0, head + columns - end, 0)


@triton.jit
def _fold(
    u, top, sumexp, weighted, scale,
    EXTRAS: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Fold a block [STEPS * LANES * VECTOR] into each lane's statistics; `scale` takes differences of u to bits."""
    u = tl.reshape(u, [STEPS, LANES, VECTOR])
    new_top = tl.maximum(top, tl.max(tl.max(u, axis=2), axis=0))
    away = (u - new_top[None, :, None]) * scale
    weights = tl.exp2(away)
    sumexp, weighted = _lower(sumexp, weighted, (top - new_top) * scale, EXTRAS)
    sumexp += tl.sum(tl.sum(weights, axis=2), axis=0)
    if EXTRAS:
        weighted += tl.sum(tl.sum(tl.where(weights > 0, weights * away, 0.0), axis=2), axis=0)
    return new_top, sumexp, weighted


@triton.jit
def _lane_sum(u, VECTOR: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(u, [STEPS, LANES, VECTOR]), axis=2), axis=0)


@triton.jit
def _lower(sumexp, weighted, bits, EXTRAS: tl.constexpr):
    """Sums of 2^a and of 2^a * a once `bits` (<= 0, or a rounding error) is added to every a."""
    factor = tl.exp2(bits)
    if EXTRAS:
        weighted = tl.where(factor > 0, (weighted + sumexp * bits) * factor, 0.0)
    return sumexp * factor, weighted


@triton.jit
def _reduce_lanes(top, sumexp, weighted, total, scale, EXTRAS: tl.constexpr):
    """One row's statistics from its lanes'."""
    row_top = tl.max(top, axis=0)
    sumexp, weighted = _lower(sumexp, weighted, (top - row_top) * scale, EXTRAS)
    return row_top, tl.sum(sumexp, axis=0), tl.sum(weighted, axis=0), tl.sum(total, axis=0)


@triton.jit
def _label_u(row, label, first_column, columns, inner, SOFTCAP: tl.constexpr):
    column = label.to(tl.int64) - first_column
    inside = (column >= 0) & (column < columns)
    u = _squash(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), inner, SOFTCAP)
    return tl.where(inside, u, float("-inf"))


@triton.jit
def _finish(stats, at, u_label, top, sumexp, weighted, total, outer, RUNNING: tl.constexpr, EXTRAS: tl.constexpr):
    """Turn a row's statistics in u and bits into RowStats, merge them with the running ones, and store."""
    label_logit = u_label * outer
    logp = (u_label - top) * outer - tl.log(sumexp)
    z_top = top * outer
    # sumexp belongs to the exact maximum; refer it to the rounded one that is stored.
    rounding = tl.where(sumexp > 0, tl.fma(top, outer, -z_top), 0.0)
    sumexp, weighted = _lower(sumexp, weighted, rounding * LOG2E, EXTRAS)
    z_top = tl.where(sumexp == 0, float("-inf"), z_top)
    if RUNNING:
        old_top = tl.load(stats.max + at)
        new_top = tl.maximum(old_top, z_top)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        old_sumexp = tl.load(stats.sumexp + at)
        old_weighted = tl.zeros_like(sumexp)
        if EXTRAS:
            old_weighted = tl.load(stats.weighted + at) * LOG2E
            total += tl.load(stats.total + at) / outer
        old_sumexp, old_weighted = _lower(old_sumexp, old_weighted, (old_top - finite) * LOG2E, EXTRAS)
        sumexp, weighted = _lower(sumexp, weighted, (z_top - finite) * LOG2E, EXTRAS)
        sumexp += old_sumexp
        weighted += old_weighted
        z_top = new_top
        label_logit = tl.maximum(label_logit, tl.load(stats.label_logit + at))
        logp = (label_logit - z_top) - tl.log(sumexp)
    # max() passes over NaN, the sum does not.
    z_top = tl.where((sumexp != sumexp) & (z_top < float("inf")), sumexp, z_top)
    tl.store(stats.logp + at, logp)
    tl.store(stats.max + at, z_top)
    tl.store(stats.sumexp + at, sumexp)
    tl.store(stats.label_logit + at, label_logit)
    if EXTRAS:
        tl.store(stats.weighted + at, weighted * LN2)
        tl.store(stats.total + at, total * outer)


@triton.jit
def _store_unscored(stats, at, EXTRAS: tl.constexpr):
    tl.store(stats.logp + at, 0.0)
    tl.store(stats.max + at, 0.0)
    tl.store(stats.sumexp + at, 1.0)
    tl.store(stats.label_logit + at, 0.0)
    if EXTRAS:
        tl.store(stats.weighted + at, 0.0)
        tl.store(stats.total + at, 0.0)


@triton.jit
def _grad(x, column, label_column, top, others, own, inner, outer, SOFTCAP: tl.constexpr):
    """Gradient of some columns, none of them the label's if `column` is None."""
    u = _squash(x, inner, SOFTCAP)
    grad = tl.exp2(tl.fma(u, outer, -top) * LOG2E) * others
    if column is not None:
        grad = tl.where(column == label_column, own, grad)
    if SOFTCAP:
        grad *= 1.0 - u * u
    return grad


@triton.jit
def _exceeds(grad, threshold):
    """|grad| > threshold, and true of NaN."""
    return (tl.abs(grad) <= threshold) == 0


@triton.jit
def _squash(x, inner, SOFTCAP: tl.constexpr):
    return _tanh(x * inner) if SOFTCAP else x


@triton.jit
def _tanh(x):
    """tanh to about two units in the last place: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    y = x * x
    small = x + x * y * (-0.33333319 + y * (0.13332488 + y * (-0.053831007 + y * (0.020951715 - y * 0.0060724764))))
    big = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -big, big))


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0 without cancellation."""
    half = _tanh(0.5 * x)
    return 2.0 * half / (1.0 - half)


def _checked(logits: Tensor) -> Tensor:
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float16 for the Triton kernels, got {logits.dtype}")
    return logits if logits.shape[-1] <= 1 or logits.stride(-1) == 1 else logits.contiguous()


def _empty_stats(labels: Tensor, extras: bool) -> RowStats:
    return RowStats(*(labels.new_empty(labels.shape, dtype=torch.float32) for _ in range(6 if extras else 4)))


def _contiguous(running: RowStats) -> RowStats:
    if not all(x.is_contiguous() for x in running if x is not None):
        raise ValueError(f"running must be contiguous to be continued in place; got strides {running.logp.stride()}")
    return running


def _scales(options: TokenOptions) -> tuple[float, float]:
    """`inner` and `outer` of `z = outer * tanh(inner * x)`; without a softcap `z = outer * x`."""
    if options.softcap is None:
        return 1.0, options.logit_scale / options.temperature
    return options.logit_scale / options.softcap, options.softcap / options.temperature


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _blocks(columns: int, tiling: Tiling) -> int:
    return triton.cdiv(columns, tiling.vector * tiling.lanes * tiling.steps * tiling.splits)


def _constants(tiling: Tiling) -> dict[str, int | bool]:
    return dict(
        VECTOR=tiling.vector, LANES=tiling.lanes, STEPS=tiling.steps, num_warps=NUM_WARPS, enable_fp_fusion=True
    )


def _common_vector(a: Tensor, b: Tensor) -> int:
    """Columns in the widest vector, up to 16 bytes, that is aligned in a row of `b` where it is in that row of `a`."""
    gaps = [a.data_ptr() // a.itemsize - b.data_ptr() // b.itemsize]
    gaps += [x - y for x, y, size in zip(a.stride()[:2], b.stride()[:2], a.shape) if size > 1]
    vector = 16 // min(a.itemsize, b.itemsize)
    while any(gap % vector for gap in gaps):
        vector //= 2
    return vector
