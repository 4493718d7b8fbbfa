"""Blocks and launch sizes of the row kernels.

Columns are counted from the first 16-byte boundary in the row, so loads stay 16 bytes wide whatever the row's address;
the few columns before it and after the last whole vector are the *edges*, one to a lane.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import TokenOptions

NUM_WARPS = 4
LANES = NUM_WARPS * (64 if torch.version.hip else 32)
MOST_STEPS = 4  # vectors a lane and block
SPLIT_PROGRAMS = 8  # per processor, if one program per row would leave processors idle
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = ["length", "columns", "first_column", "ignore_index", "blocks"]


class Tiling(NamedTuple):
    """Blocks of a row: `lanes * steps` vectors of `vector` columns each, divided among `splits` programs."""

    vector: int
    lanes: int
    steps: int
    splits: int


def choose_tiling(rows: int, columns: int, vector: int, processors: int) -> Tiling:
    """Blocks with some vectors per lane; several programs per row only if one per row would leave processors idle."""
    vectors = triton.cdiv(columns, vector)
    steps = min(MOST_STEPS, triton.next_power_of_2(triton.cdiv(vectors, LANES)))
    blocks = triton.cdiv(vectors, LANES * steps)
    splits = 1
    if 2 * rows < SPLIT_PROGRAMS * processors:
        splits = min(
            triton.next_power_of_2(triton.cdiv(SPLIT_PROGRAMS * processors, rows)), triton.next_power_of_2(blocks)
        )
    return Tiling(vector, LANES, steps, splits)


def checked(logits: Tensor) -> Tensor:
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float16 for the Triton kernels, got {logits.dtype}")
    return logits if logits.shape[-1] <= 1 or logits.stride(-1) == 1 else logits.contiguous()


def scales(options: TokenOptions) -> tuple[float, float]:
    """`inner` and `outer` of `z = outer * tanh(inner * x)`; without a softcap `z = outer * x`."""
    if options.softcap is None:
        return 1.0, options.logit_scale / options.temperature
    return options.logit_scale / options.softcap, options.softcap / options.temperature


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def count_blocks(columns: int, tiling: Tiling) -> int:
    return triton.cdiv(columns, tiling.vector * tiling.lanes * tiling.steps * tiling.splits)


def constants(tiling: Tiling) -> dict[str, int | bool]:
    return dict(
        VECTOR=tiling.vector, LANES=tiling.lanes, STEPS=tiling.steps, num_warps=NUM_WARPS, enable_fp_fusion=True
    )


def common_vector(a: Tensor, b: Tensor) -> int:
    """Columns in the widest vector, up to 16 bytes, that is aligned in a row of `b` where it is in that row of `a`."""
    gaps = [a.data_ptr() // a.itemsize - b.data_ptr() // b.itemsize]
    gaps += [x - y for x, y, size in zip(a.stride()[:2], b.stride()[:2], a.shape) if size > 1]
    vector = 16 // min(a.itemsize, b.itemsize)
    while any(gap % vector for gap in gaps):
        vector //= 2
    return vector


@triton.jit
def vector_range(row, columns, VECTOR: tl.constexpr):
    """Columns [head, end) of a row that make whole vectors at aligned addresses."""
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    past = (row.to(tl.int64) // SIZE % VECTOR).to(tl.int32)
    head = tl.minimum((VECTOR - past) % VECTOR, columns)
    return head, head + (columns - head) // VECTOR * VECTOR


@triton.jit
def edge_columns(head, end, columns, split, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Columns outside [head, end), at most one a lane, and which lanes have one; they belong to the first split."""
    lane = tl.arange(0, LANES)
    column = tl.where(lane < head, lane, end + lane - head)
    return column, lane < tl.where(split == 0, head + columns - end, 0)
