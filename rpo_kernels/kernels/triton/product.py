"""The head's product with the softmax in its epilogue: statistics of rows of logits that are not written to memory.

A persistent program multiplies blocks of hidden states `[rows, H]` by blocks of the weight `[columns, H]`, reduces each
block of logits to one number per row and statistic, and continues. A second kernel merges the blocks of a row in the
order of their columns, so that results do not depend on how many programs there were.

As in `stats.py`, `u = x`, or `tanh(inner * x)` with a softcap, and `z = outer * u`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..interface import RowStats, TokenOptions
from .arithmetic import LOG2E, LOWEST, squash
from .stats import finish_row
from .tiling import processors, scales

MERGED_ROWS, MERGED_BLOCKS = 32, 32
_GROUP = tl.constexpr(
    8
)  # blocks of rows that process the same columns at a time, so that both operands stay in the L2 cache
_INTEGERS = ["rows", "vocab", "blocks"]


class Blocks(NamedTuple):
    """What a program multiplies at once, and by how many warps and stages of the pipeline."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Chosen by registers and shared memory (bench/triton_code.py), not by time.
HOPPER = Blocks(128, 256, 64, warps=8, stages=3)
NVIDIA = Blocks(128, 128, 64, warps=8, stages=3)
AMD = Blocks(128, 128, 32, warps=8, stages=2)
FLOAT32 = Blocks(64, 64, 32, warps=4, stages=2)  # without matrix units: right, not fast


def product_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: TokenOptions,
    stats: RowStats,
    blocks: Blocks | None = None,
) -> None:
    """`row_stats` of the logits `hidden @ weight.T + bias`, all rows scored, in two launches, the same bits each time.

    Args:
        hidden: `[n, H]`, float32, bfloat16 or float16; rows contiguous and beginning at multiples of 16 bytes.
        weight: `[V, H]` as hidden.
        bias: `[V]` or None.
        labels: `[n]` int64; one out of range has the log-probability -inf.
        options: scale, softcap and temperature.
        stats: where the first four are written, float32, contiguous `[1, n]`.
        blocks: default by device.
    """
    rows, vocab = len(hidden), len(weight)
    if rows == 0:
        return
    blocks = blocks or blocks_of(hidden)
    column_blocks = triton.cdiv(vocab, blocks.columns)
    partial = hidden.new_empty(2, column_blocks, rows, dtype=torch.float32)
    of_labels = hidden.new_empty(rows, dtype=torch.float32)
    inner, outer = scales(options)
    programs = min(processors(hidden), column_blocks * triton.cdiv(rows, blocks.rows))
    with torch.cuda.device_of(hidden):
        product_kernel[(programs,)](
            TensorDescriptor.from_tensor(hidden, [blocks.rows, blocks.inner]),
            TensorDescriptor.from_tensor(weight, [blocks.columns, blocks.inner]),
            *(bias, labels, partial, of_labels, rows, vocab, inner, outer),
            SOFTCAP=options.softcap is not None,
            WIDTH=hidden.shape[1],
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            INNER=blocks.inner,
            UPCAST=not hidden.is_cuda,  # the interpreter would multiply bfloat16's bits
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,
        )
        merge_kernel[(triton.cdiv(rows, MERGED_ROWS),)](
            *(labels, stats, partial, of_labels, rows, vocab, column_blocks, outer),
            ROWS=MERGED_ROWS,
            BLOCKS=MERGED_BLOCKS,
            num_warps=4,
            enable_fp_fusion=True,
        )


def blocks_of(x: Tensor) -> Blocks:
    """Blocks for the device and dtype of a tensor."""
    if x.dtype == torch.float32:
        return FLOAT32
    if torch.version.hip:
        return AMD
    return HOPPER if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 else NVIDIA


@triton.jit(do_not_specialize=_INTEGERS)
def product_kernel(
    hidden,  # descriptor of [rows, WIDTH], blocks [ROWS, INNER]
    weight,  # descriptor of [vocab, WIDTH], blocks [COLUMNS, INNER]
    bias,  # [vocab], or None
    labels,  # [rows]
    partial,  # [2, blocks, rows]: maximum of u, sum of exponentials relative to it
    of_labels,  # [rows]: u of the labels within the vocabulary
    rows,
    vocab,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program: every so many of the blocks [ROWS, COLUMNS] of logits, each reduced to statistics of its rows."""
    row_blocks = tl.cdiv(rows, ROWS)
    column_blocks = tl.cdiv(vocab, COLUMNS)
    group_blocks = column_blocks * _GROUP
    scale = outer * LOG2E
    field = column_blocks.to(tl.int64) * rows
    for block in range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        first = block // group_blocks * _GROUP
        height = tl.minimum(row_blocks - first, _GROUP)
        m = first + block % group_blocks % height
        v = block % group_blocks // height
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, WIDTH, INNER):
            left = hidden.load([m * ROWS, k])
            right = weight.load([v * COLUMNS, k])
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            x = tl.dot(left, right.T, x, input_precision="ieee")

        row = m * ROWS + tl.arange(0, ROWS)
        column = v * COLUMNS + tl.arange(0, COLUMNS)
        live = row < rows
        if bias is not None:
            x += tl.load(bias + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
        x = squash(x, inner, SOFTCAP)
        u = tl.where((column < vocab)[None, :], x, float("-inf"))
        label = tl.load(labels + row, mask=live, other=-1).to(tl.int32)  # the merge looks at all its bits
        here = (label >= v * COLUMNS) & (label < v * COLUMNS + COLUMNS)
        own = tl.max(tl.where(column[None, :] == label[:, None], u, float("-inf")), axis=1)
        tl.store(of_labels + row, own, mask=here)
        top = tl.maximum(tl.max(u, axis=1), LOWEST)
        slot = partial + v.to(tl.int64) * rows + row
        tl.store(slot, top, mask=live)
        tl.store(slot + field, tl.sum(tl.exp2((u - top[:, None]) * scale), axis=1), mask=live)


@triton.jit(do_not_specialize=_INTEGERS)
def merge_kernel(
    labels,  # [rows]
    stats,  # RowStats of contiguous [1, rows]
    partial,  # [2, blocks, rows]
    of_labels,  # [rows]
    rows,
    vocab,
    blocks,
    outer,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program: some rows' statistics from those of their blocks of columns, in the blocks' order."""
    # Beyond the last row, the last row again: it stores the same numbers at the same address.
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), rows - 1)
    scale = outer * LOG2E
    field = blocks.to(tl.int64) * rows
    top = tl.full([ROWS], LOWEST, tl.float32)
    sumexp = tl.zeros([ROWS], tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = (first + tl.arange(0, BLOCKS))[:, None]
        slot = partial + block.to(tl.int64) * rows + row[None, :]
        tops = tl.load(slot, mask=block < blocks, other=LOWEST)
        sums = tl.load(slot + field, mask=block < blocks, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        sums *= tl.exp2((tops - new_top[None, :]) * scale)
        sumexp = sumexp * tl.exp2((top - new_top) * scale) + tl.sum(sums, axis=0)
        top = new_top
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocab)
    u_label = tl.where(valid, tl.load(of_labels + row, mask=valid, other=0.0), float("-inf"))
    finish_row(stats, row, u_label, top, sumexp, sumexp, sumexp, sumexp, sumexp, outer, False)
