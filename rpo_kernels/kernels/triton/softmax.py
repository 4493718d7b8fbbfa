"""`TileSoftmax` in Triton: one launch per tile of logits, one at the end of a chunk of rows, one per tile in backward.

A program holds its row of the tile in registers, so that each logit is read once and each P written once. In the
kernels `u = x`, or `tanh(inner * x)` with a softcap, and `z = outer * u`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import ActiveColumns, RowStats, TokenOptions, row_length
from ..kept import KeptTiles
from ..softmax import LARGEST_ENTRY, SLACK, TileSoftmax
from .arithmetic import COARSE, LOG2E, LOWEST, expm1, squash
from .tiling import scales

COLUMNS_A_WARP = 1024  # of a row in registers: 32 a thread
BLOCK_H = 1024
_SLACK = tl.constexpr(SLACK)
_LARGEST_SUM = tl.constexpr(1024.0)  # e^SLACK
_LARGEST_ENTRY = tl.constexpr(LARGEST_ENTRY)
_INTEGERS = [
    "columns",
    "first_column",
    "rows",
    "row_start",
    "vocab",
    "tiles",
    "shared_tiles",
    "shared_first",
    "label_stride",
]
# Views of these start at any address: do not specialise on their alignment.
_VECTORS = ["labels", "tops", "sumexps", "label_logits", "logps", "references", "early_logits", "dropped", "factors"]


class FusedTileSoftmax(TileSoftmax):
    """One kernel for each pass; see `TileSoftmax` for what they do."""

    def scale_rows(self, hidden: Tensor, factor: Tensor, before: Tensor | None, out: Tensor) -> None:
        """As the reference; rows whose factor has not changed are skipped."""
        rows, width = hidden.shape
        if rows == 0:
            return
        block = min(BLOCK_H, triton.next_power_of_2(width))
        with torch.cuda.device_of(hidden):
            scale_rows_kernel[(rows,)](
                *(hidden, out, factor, before), WIDTH=width, BLOCK_H=block, num_warps=4, enable_fp_fusion=True
            )

    def weigh(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        first_column: int,
        options: TokenOptions,
        references: Tensor,
        out: Tensor,
        sums: Tensor | None,
    ) -> None:
        """As the reference, in one launch."""
        self._step(logits, labels, stats, first_column, options, references=references, out=out, sums=sums)

    def mark(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        first_column: int,
        options: TokenOptions,
        label_logits: Tensor,
        active: ActiveColumns,
        dropped: Tensor,
    ) -> None:
        """As the reference, in one launch, but for `dropped`: a row counts the columns that it did not mark itself,
        of which other rows may have marked some."""
        self._step(
            *(logits, labels, stats, first_column, options),
            early_logits=label_logits,
            active=active.mask,
            dropped=dropped,
            threshold=active.threshold,
        )

    def finish(
        self,
        stats: RowStats,
        labels: Tensor,
        options: TokenOptions,
        references: Tensor,
        sums: Tensor | None,
        weight: Tensor,
        kept: KeptTiles,
    ) -> None:
        """As the reference, in one launch."""
        if len(labels) == 0:
            return
        width = weight.shape[1]
        with torch.cuda.device_of(weight):
            finish_kernel[(len(labels),)](
                *(labels, stats.max, stats.sumexp, stats.label_logit, stats.logp, references, sums, weight),
                *(kept.memory, kept.grad_weight, references.stride(0), weight.stride(), kept.rows, kept.span.start),
                *(kept.vocab, kept.tile_columns, kept.tiles, kept.shared.tiles, kept.shared.first, *scales(options)),
                SOFTCAP=options.softcap is not None,
                KEEPS=kept.tiles > 0,
                WIDTH=width,
                TILES=triton.next_power_of_2(max(1, kept.tiles)),
                BLOCK_H=min(BLOCK_H, triton.next_power_of_2(width)),
                num_warps=4,
                enable_fp_fusion=True,
            )

    def _step(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        first_column: int,
        options: TokenOptions,
        references: Tensor | None = None,
        out: Tensor | None = None,
        sums: Tensor | None = None,
        early_logits: Tensor | None = None,
        active: Tensor | None = None,
        dropped: Tensor | None = None,
        threshold: float = 0.0,
    ) -> None:
        rows, columns = logits.shape
        if rows == 0:
            return
        block = triton.next_power_of_2(row_length(columns))
        width = 1 if sums is None else sums.shape[1]
        with torch.cuda.device_of(logits):
            tile_kernel[(rows,)](
                *(logits, out, labels, stats.max, stats.sumexp, stats.label_logit, references, sums),
                *(early_logits, active, dropped, logits.stride(0), 0 if out is None else out.stride(0)),
                *(columns, first_column, *scales(options), threshold),
                SOFTCAP=options.softcap is not None,
                FULL=columns == block,
                PADDED=all(x is None or x.stride(0) == row_length(columns) for x in (logits, out)),
                WIDTH=width,
                BLOCK=block,
                BLOCK_H=min(BLOCK_H, triton.next_power_of_2(width)),
                num_warps=max(1, min(16, block // COLUMNS_A_WARP)),
                enable_fp_fusion=True,
            )


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_VECTORS)
def tile_kernel(
    logits,  # [n, v]
    out,  # [n, v], or None
    labels,  # [n], as the vectors below
    tops,
    sumexps,
    label_logits,
    references,  # or None
    sums,  # [n, WIDTH], or None
    early_logits,  # the labels' logits, known beforehand; or None
    active,  # [v] uint8, or None
    dropped,  # or None
    logits_stride,
    out_stride,
    columns,
    first_column,
    inner,
    outer,
    threshold,
    SOFTCAP: tl.constexpr,
    FULL: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (row): `weigh` where `out` is given, `mark` where `active` is."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    here = logits + row * logits_stride
    # What lies between the columns and the row's padded end is read and written with them, 16 bytes at a time.
    length = (columns + 15) // 16 * 16 if PADDED else columns
    if FULL:
        x = tl.load(here + offsets, eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(here + offsets, mask=offsets < length, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
    u = squash(x, inner, SOFTCAP)
    if SOFTCAP and not FULL:
        u = tl.where(inside, u, float("-inf"))
    label = tl.load(labels + row)
    offset = (label - first_column).to(tl.int32)
    has_label = (label >= first_column) & (label < first_column + columns)
    u_label = squash(tl.load(here + offset, mask=has_label, other=0.0).to(tl.float32), inner, SOFTCAP)
    if has_label:
        tl.store(label_logits + row, u_label * outer)

    before = tl.load(tops + row)
    u_top = tl.max(u, axis=0)
    top = u_top * outer
    base = tl.where(top - before > _SLACK, top, before)
    base = tl.where(base == float("-inf"), 0.0, base)
    # From the exact maximum: beyond COARSE what its product rounds off would overflow the exponential.
    away = tl.where(tl.abs(top) < COARSE, tl.fma(u_top, outer, -base), top - base)
    p = tl.exp2(tl.fma(u - tl.maximum(u_top, LOWEST), outer * LOG2E, away * LOG2E))
    sumexp = tl.load(sumexps + row) * tl.exp2((before - base) * LOG2E) + tl.sum(p, axis=0)
    moves = (base != before) | (sumexp > _LARGEST_SUM)
    reference = tl.where(moves, base + tl.log(sumexp), before)
    finite = tl.where(reference == float("-inf"), 0.0, reference)
    shrink = tl.exp2((base - finite) * LOG2E)
    sumexp *= shrink
    tl.store(tops + row, reference)
    tl.store(sumexps + row, sumexp)
    factor = tl.exp2((before - finite) * LOG2E)

    p *= shrink
    if SOFTCAP:
        p *= 1.0 - u * u
    others = offsets != tl.where(has_label, offset, -1)
    if not FULL:
        others = others & inside
    p = tl.where(others, p, 0.0)
    if out is not None:
        tl.store(references + row, reference)
        if FULL:
            tl.store(out + row * out_stride + offsets, p.to(out.dtype.element_ty))
        else:
            tl.store(out + row * out_stride + offsets, p.to(out.dtype.element_ty), mask=offsets < length)
    if sums is not None:  # noqa: SIM102
        if factor != 1.0:
            for h in range(0, WIDTH, BLOCK_H):
                at = h + tl.arange(0, BLOCK_H)
                part = tl.load(sums + row * WIDTH + at, mask=at < WIDTH, other=0.0)
                tl.store(sums + row * WIDTH + at, part * factor, mask=at < WIDTH)
    if active is not None:
        slope = outer * inner if SOFTCAP else outer
        early = tl.where(label >= first_column + columns, tl.exp2((tl.load(early_logits + row) - finite) * LOG2E), 0.0)
        counts = (p * slope <= threshold * (sumexp + early)) == 0  # true of NaN
        tl.store(active + offsets, 1, mask=counts & inside)
        left_out = tl.sum(tl.where(counts, 0.0, p), axis=0) * slope
        tl.store(dropped + row, tl.load(dropped + row) * factor + left_out)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_VECTORS)
def finish_kernel(
    labels,  # [n], as the vectors below
    tops,
    sumexps,
    label_logits,
    logps,
    references,  # [tiles, n]
    sums,  # [n, WIDTH], or None
    weight,  # [V, WIDTH]
    kept,  # flat, of all rows
    grad_weight,  # with the shared tiles from element `shared_first` on
    reference_stride,
    weight_strides,
    rows,  # of `kept`
    row_start,  # which of them is the first here
    vocab,
    tile_columns,
    tiles,
    shared_tiles,
    shared_first,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    KEEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (row): log-probability, dlogp/dhidden, the tiles' scales, and the label's entry in the saved tile."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocab)
    label = tl.where(valid, label, 0)
    top = tl.load(tops + row)
    sumexp = tl.load(sumexps + row)
    z_label = tl.load(label_logits + row)
    logp = z_label - top - tl.log(sumexp)
    tl.store(logps + row, logp)
    slope = outer * inner if SOFTCAP else outer
    gain = -expm1(logp) * slope
    if SOFTCAP:
        u = z_label / outer
        gain *= tl.maximum(1.0 - u * u, 0.0)
    gain = tl.where(valid, gain, 0.0)
    last = slope / sumexp
    if sums is not None:
        for h in range(0, WIDTH, BLOCK_H):
            at = h + tl.arange(0, BLOCK_H)
            here = at < WIDTH
            of_label = tl.load(weight + label * weight_strides[0] + at * weight_strides[1], mask=here, other=0.0)
            part = tl.load(sums + row * WIDTH + at, mask=here, other=0.0)
            tl.store(sums + row * WIDTH + at, of_label.to(tl.float32) * gain - part * last, mask=here)
    if KEEPS:
        tile = tl.arange(0, TILES)
        slots = references + tile.to(tl.int64) * reference_stride + row
        scale = tl.exp2((tl.load(slots, mask=tile < tiles, other=0.0) - top) * LOG2E) * last
        of_label = tl.where(valid & (label < tiles * tile_columns), label // tile_columns, -1)
        own_scale = tl.sum(tl.where(tile == of_label, scale, 0.0), axis=0)
        # If the reference has moved far since, the entry could overflow the saved dtype.
        far = (of_label >= 0) & (gain > _LARGEST_ENTRY * own_scale)
        tl.store(slots, tl.where(far & (tile == of_label), last, scale), mask=tile < tiles)
        if of_label >= 0:
            first = of_label * tile_columns
            columns = tl.minimum(vocab - first, tile_columns).to(tl.int32)
            length = (columns + 15) // 16 * 16
            is_shared = of_label < shared_tiles
            memory = tl.where(is_shared, grad_weight + shared_first, kept)
            tiles_before = of_label - tl.where(is_shared, 0, shared_tiles)
            start = memory + tiles_before * tile_columns * rows + (row_start + row) * length
            own = (label - first).to(tl.int32)
            if far:
                for i in range(0, columns, BLOCK_H):
                    at = i + tl.arange(0, BLOCK_H)
                    others = (at < columns) & (at != own)
                    part = tl.load(start + at, mask=others, other=0.0).to(tl.float32) * (own_scale / last)
                    tl.store(start + at, part.to(kept.dtype.element_ty), mask=others)
                own_scale = last
            tl.store(start + own, (-gain / own_scale).to(kept.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def scale_rows_kernel(
    hidden,  # [n, WIDTH]
    out,  # [n, WIDTH]
    factors,  # [n]
    before,  # [n], or None
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (row): the row of `hidden` times its factor, skipped if the factor has not changed."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    if before is not None:  # noqa: SIM102
        if factor == tl.load(before + row):
            return
    for h in range(0, WIDTH, BLOCK_H):
        at = h + tl.arange(0, BLOCK_H)
        x = tl.load(hidden + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + at, (x * factor).to(out.dtype.element_ty), mask=at < WIDTH)
