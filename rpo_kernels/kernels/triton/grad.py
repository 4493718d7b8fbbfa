"""`row_grad` in Triton: the gradient of the log-probabilities, one pass over the rows of a tile of logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import ActiveColumns, EntropyGrad, RowStats, TokenOptions
from .arithmetic import COARSE, LN2, LOG2E, expm1, squash
from .tiling import (
    DTYPES,
    INTEGERS,
    checked,
    choose_tiling,
    common_vector,
    constants,
    count_blocks,
    edge_columns,
    processors,
    scales,
    vector_range,
)


def row_grad(
    logits: Tensor,
    labels: Tensor,
    stats: RowStats,
    grad_logps: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    out: Tensor | None = None,
    active: ActiveColumns | None = None,
    entropy: EntropyGrad | None = None,
) -> Tensor:
    """`reference.row_grad` for float32, bfloat16 and float16 logits and `out`; one launch.

    Rows of `logits` and `out` may be strided, `grad_logps` and the entropy's factor may have any strides. Loads and
    stores are 16 bytes wide if rows of both tensors have the same alignment, else narrower. An `out` whose last stride
    is not 1 is written through a copy.

    Raises:
        ValueError: for another dtype, or an `out` of another shape.
    """
    source = checked(logits)
    if out is None:
        out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if out.shape != source.shape or out.dtype not in DTYPES:
        raise ValueError(
            f"out must be float32, bfloat16 or float16 of shape {list(source.shape)}; "
            f"got {out.dtype} of shape {list(out.shape)}"
        )
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return out.copy_(row_grad(source, labels, stats, grad_logps, options, first_column, dense, active, entropy))
    if out.numel() == 0:
        return out
    columns = source.shape[-1]
    tiling = choose_tiling(labels.numel(), columns, common_vector(source, out), processors(source))
    logps, tops, sumexps = (x.contiguous() for x in stats[:3])
    entropies, slopes = (None, None) if entropy is None else (entropy.entropy.contiguous(), entropy.factor)
    with torch.cuda.device_of(source):
        row_grad_kernel[(labels.numel(), tiling.splits)](
            *(source, out, None if active is None else active.mask, labels, logps, tops, sumexps, entropies),
            *(grad_logps, slopes, source.stride()[:2], out.stride()[:2], labels.stride(), grad_logps.stride()),
            (0, 0) if slopes is None else slopes.stride(),
            *(*labels.shape[1:], columns, first_column, options.ignore_index, *scales(options)),
            count_blocks(columns, tiling),
            0.0 if active is None else active.threshold,
            SOFTCAP=options.softcap is not None,
            SHIFT=options.shift,
            **constants(tiling),
        )
    return out


@triton.jit(do_not_specialize=INTEGERS)
def row_grad_kernel(
    logits,  # [B, length, columns]
    out,  # [B, length, columns], may be logits
    active,  # [columns] uint8, or None
    labels,  # [B, length], as the six below; the next four contiguous
    logps,
    tops,
    sumexps,
    entropies,  # or None
    grad_logps,
    grad_entropies,  # or None
    logits_strides,
    out_strides,
    labels_strides,
    grad_strides,
    entropy_strides,
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

    head, end = vector_range(row, columns, VECTOR)
    body = tl.multiple_of(row + head, VECTOR * row.dtype.element_ty.primitive_bitwidth // 8)
    out_body = tl.multiple_of(out_row + head, VECTOR * out.dtype.element_ty.primitive_bitwidth // 8)
    column, inside = edge_columns(head, end, columns, split, VECTOR, LANES)
    BLOCK: tl.constexpr = VECTOR * LANES * STEPS
    TILTED: tl.constexpr = entropies is not None
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
    sumexp = tl.load(sumexps + at)
    logp = tl.load(logps + at)
    factor = tl.load(grad_logps + batch * grad_strides[0] + position * grad_strides[1]).to(tl.float32) * outer
    if SOFTCAP:
        factor *= inner
    # Factors of a column's exponential and of the label's column, without the softcap's derivative.
    others = -factor / sumexp
    own = -expm1(logp) * factor
    tilt = 0.0
    if entropies is not None:
        # -p (log p + entropy): a column's factor gets a term linear in its distance from the maximum, in bits.
        entropy = tl.load(entropies + at)
        slope = tl.load(grad_entropies + batch * entropy_strides[0] + position * entropy_strides[1])
        slope = slope.to(tl.float32) * outer
        if SOFTCAP:
            slope *= inner
        others -= slope / sumexp * (entropy - tl.log(sumexp))
        tilt = -slope / sumexp * LN2
        log_p = tl.maximum(logp, -1e4)
        own -= slope * tl.exp2(log_p * LOG2E) * (log_p + entropy)
    label_column = label.to(tl.int64) - first_column

    edges = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    # Beyond COARSE only columns at the row's exact maximum have a probability.
    to_z, to_bits = outer, outer * 0.0 + LOG2E
    if tl.abs(top) >= COARSE:
        exact = tl.where(inside, squash(edges, inner, SOFTCAP), float("-inf"))
        lane = tl.arange(0, LANES)
        for first in range(start, stop, LANES):
            here = lane < stop - first
            u = squash(tl.load(body + first + lane, mask=here, other=0.0).to(tl.float32), inner, SOFTCAP)
            exact = tl.maximum(exact, tl.where(here, u, float("-inf")))
        exact = tl.max(exact, axis=0)
        holds_top = exact * outer >= top
        others = tl.where(holds_top, others, 0.0)
        tilt = tl.where(holds_top, tilt, 0.0)
        to_z, to_bits, top = 1.0, outer * LOG2E, exact
    edges = _grad(edges, column, label_column, top, others, tilt, own, inner, to_z, to_bits, TILTED, SOFTCAP)
    tl.store(out_row + column, edges.to(out.dtype.element_ty), mask=inside)
    if active is not None:
        tl.store(active + column, 1, mask=inside & _exceeds(edges, threshold))
    # Whole blocks without the label need no masks; the label's block and the partial one follow.
    label_offset = (label_column - head).to(tl.int32)
    whole = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    holds_label = (label_offset >= start) & (label_offset < whole)
    special = tl.where(holds_label, label_offset // BLOCK * BLOCK, whole)
    for i in range(start, tl.where(holds_label, whole - BLOCK, whole), BLOCK):
        first = i + tl.where(i >= special, BLOCK, 0)
        x = tl.load(body + first + offsets, eviction_policy="evict_first").to(tl.float32)
        grad = _grad(x, None, None, top, others, tilt, own, inner, to_z, to_bits, TILTED, SOFTCAP)
        tl.store(out_body + first + offsets, grad.to(out.dtype.element_ty))
        if active is not None:
            tl.store(active + head + first + offsets, 1, mask=_exceeds(grad, threshold))
    for first in range(special, stop, tl.where(special < whole, whole - special, BLOCK)):
        here = offsets < stop - first
        x = tl.load(body + first + offsets, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        grad = _grad(x, offsets, label_offset - first, top, others, tilt, own, inner, to_z, to_bits, TILTED, SOFTCAP)
        tl.store(out_body + first + offsets, grad.to(out.dtype.element_ty), mask=here)
        if active is not None:
            tl.store(active + head + first + offsets, 1, mask=here & _exceeds(grad, threshold))


@triton.jit
def _grad(
    x, column, label_column, top, others, tilt, own, inner, to_z, to_bits, TILTED: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Gradient of some columns, none of them the label's if `column` is None."""
    u = squash(x, inner, SOFTCAP)
    away = tl.fma(u, to_z, -top) * to_bits
    factor = others
    if TILTED:
        factor += tl.maximum(away, -1e4) * tilt  # finite: 0 times it is 0
    grad = tl.exp2(away) * factor
    if column is not None:
        grad = tl.where(column == label_column, own, grad)
    if SOFTCAP:
        grad *= 1.0 - u * u
    return grad


@triton.jit
def _exceeds(grad, threshold):
    """|grad| > threshold, and true of NaN."""
    return (tl.abs(grad) <= threshold) == 0
