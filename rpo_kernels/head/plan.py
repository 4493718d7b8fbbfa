"""Memory planner of the LM head: chunks and tiles, what to save for backward, and the cost.

Pure arithmetic: forward and backward follow the plan, and the command line predicts from it.
"""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels import native_head
from ..kernels.interface import row_length
from ..kernels.kept import SharedTiles
from . import evaluation_plan
from .budget import parse_budget
from .cpu.plan import CpuWork
from .evaluation_plan import EvaluationWork

EDGE = 256  # tiles of the vocabulary begin at multiples of this
LEAST_KEPT = 1 / 16  # of the columns: keeping fewer saves less than larger tiles do
DENSE_SHARE = (
    0.6  # above this share of active columns, a product over all columns costs less than gathering the active ones
)
# Rows of a chunk and columns of a tile, at most and at least: large enough for GEMMs at full rate, on a CPU
# small enough that a tile of logits is still in the last-level cache when the row kernels read it.
_SHAPES = {"cpu": ((1024, 4096), (128, EDGE))}
_ACCELERATOR_SHAPES = ((8192, 8192), (1024, 2048))
_SMALL = 2048  # tensors of a few numbers


@dataclass(frozen=True)
class MemoryPlan:
    """How `linear_token_logprobs` does its work. Bytes are beyond its inputs, its result and their gradients.

    Attributes:
        chunk_rows: scored rows a chunk.
        tile_columns: columns of the vocabulary a tile; logits exist one `[chunk_rows, tile_columns]` tile at a time.
            The vocabulary, where one product without gradients takes it whole and no logits exist.
        tiles: tiles that the vocabulary is cut into.
        kept_tiles: tiles whose `d logp / d logits` is kept for the weight's gradient; backward recomputes the others.
        kept_bytes: what waits for backward: the kept tiles, the hidden states' gradient, statistics. Without the tiles
            that lie in the memory of the weight's gradient.
        forward_bytes: peak of the forward pass, kept bytes included.
        backward_bytes: peak of the backward pass, kept bytes included.
        gradient_bytes: the gradients themselves, not counted above.
        shared: which of the kept tiles lie in the memory of the weight's gradient, which forward then allocates.
        head_gemms: `[rows, hidden] x [hidden, vocab]` products, forward and backward; with a column filter, as if all
            columns were active.
    """

    chunk_rows: int
    tile_columns: int
    tiles: int
    kept_tiles: int
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
    shared: SharedTiles
    head_gemms: float

    @property
    def peak_bytes(self) -> int:
        """The larger of the two passes' peaks."""
        return max(self.forward_bytes, self.backward_bytes)


def memory_plan(
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    needs_hidden: bool = True,
    needs_weight: bool = True,
    positions: int | None = None,
    memory_budget: int | str | None = None,
    gradient_filter: float | None = None,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    entropy_grad: bool = True,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    weight_aligned: bool = True,
    inplace_backward: bool = True,
) -> MemoryPlan:
    """Plan the LM head's work within a memory budget.

    Args:
        rows: scored label positions.
        hidden, vocab: H and V, the weight's dimensions.
        dtype: of hidden states and weight.
        needs_hidden, needs_weight: which inputs need a gradient.
        positions: label positions, scored or not; default `rows`.
        memory_budget: bytes, `"512MB"` (10^6), `"1GiB"` (2^30), or None for a quarter of the device's free memory. It
            bounds `peak_bytes`. A budget below the least that the work needs gives a plan within an eighth of that
            least: smaller tiles would cost much time for little memory.
        gradient_filter, softcap: as in `linear_token_logprobs`; only whether there is one is read.
        outputs, entropy_grad: as in `linear_token_logprobs`.
        device: where the work runs.
        backend: `"torch"` counts the copies of a tile that the torch reference makes and the other backends do not.
        weight_aligned: whether the weight's rows are contiguous and begin at multiples of 16 bytes, as a parameter's.
        inplace_backward: whether tiles may be kept in the memory of the weight's gradient, if they fill half of it.
            Not so if only the bias needs a gradient, under hooks for saved tensors (activation checkpointing,
            `save_on_cpu`) and in compiled graphs; and a backward pass with `retain_graph` or `create_graph` takes
            memory for that gradient once more.

    Returns:
        `MemoryPlan`.

    Raises:
        ValueError: for negative sizes, a dtype that is not floating, or a budget that cannot be read.
    """
    device = torch.device(device)
    for name, size, least in (("rows", rows, 0), ("hidden", hidden, 1), ("vocab", vocab, 1)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    budget = parse_budget(memory_budget, device)
    sizes = rows, rows if positions is None else positions, hidden, vocab
    # With a filter or the entropy's gradient, backward computes all gradients.
    of_entropy = entropy_grad and "entropy" in outputs and (needs_hidden or needs_weight)
    filtered = gradient_filter is not None
    needs = needs_hidden, needs_weight
    work: CpuWork | EvaluationWork | _Work
    if native_head.serves(device.type, dtype, backend):
        work = CpuWork(
            *sizes, *needs, filtered=filtered, entropy=of_entropy, outputs=len(outputs), inplace=inplace_backward
        )
    elif not (outputs or needs_hidden or needs_weight) and evaluation_plan.serves(
        device, dtype, backend, width=hidden, capped=softcap is not None, aligned=weight_aligned
    ):
        work = EvaluationWork(*sizes, dtype.itemsize)
    else:
        work = _Work(
            *sizes,
            *needs,
            filtered or of_entropy,
            item_bytes=dtype.itemsize,
            operand_bytes=operand_dtype(dtype, device).itemsize,
            exact_bytes=max(4, dtype.itemsize),
            has_softcap=softcap is not None,
            torch_backend=backend == "torch",
            inplace=inplace_backward,
            device_shapes=_SHAPES.get(device.type, _ACCELERATOR_SHAPES),
        )
    return _plan(work, budget)


@functools.lru_cache(maxsize=256)
def _plan(work: "CpuWork | EvaluationWork | _Work", budget: int) -> MemoryPlan:
    chunk, tile, kept = _choose(work, budget)
    recomputed = (1 - min(1.0, kept * tile / work.vocab)) * work.needs_weight
    if work.deferred:
        recomputed = float(work.needs_hidden or work.needs_weight)
    return MemoryPlan(
        chunk_rows=chunk,
        tile_columns=tile,
        tiles=math.ceil(work.vocab / tile),
        kept_tiles=kept,
        kept_bytes=work.kept_bytes(chunk, tile, kept),
        forward_bytes=work.forward_bytes(chunk, tile, kept),
        backward_bytes=work.backward_bytes(chunk, tile, kept),
        gradient_bytes=work.gradient_bytes(),
        shared=work.shared(chunk, tile, kept),
        head_gemms=1 + work.needs_hidden + work.needs_weight + recomputed,
    )


def _choose(work: "CpuWork | EvaluationWork | _Work", budget: int) -> tuple[int, int, int]:
    """Rows a chunk, columns a tile, and tiles kept.

    A shape is chosen if it needs at most half of the budget beyond the minimum; but not while a smaller one, within
    that budget, saves more columns, so that a larger budget never costs more products. If hardly a column can be
    saved beyond the shared tiles, which are free, the largest shape that fits is chosen. A budget below the minimum may
    be exceeded by an eighth of that.
    """
    *larger, least = work.shapes
    least_bytes = work.peak_bytes(*least, 0)
    if budget <= least_bytes:
        shapes = (shape for shape in larger if work.peak_bytes(*shape, 0) <= least_bytes + least_bytes // 8)
        return *next(shapes, least), 0
    begins = [2 * work.peak_bytes(*shape, 0) - least_bytes for shape in larger] + [least_bytes]
    best, columns, pays = (*least, 0), 0, False
    for i, (chunk, tile) in reversed([*enumerate(work.shapes)]):
        if begins[i] <= budget:
            ends = max(begins[i], begins[i - 1]) if i else budget
            kept = _kept_tiles(work, chunk, tile, min(budget, ends))
            shared = work.shared(chunk, tile, kept).tiles
            if kept * tile < work.vocab and (kept - shared) * tile < LEAST_KEPT * work.vocab:
                kept = shared
            if min(kept * tile, work.vocab) >= columns:
                best, columns, pays = (chunk, tile, kept), min(kept * tile, work.vocab), kept > shared
        elif not pays:
            kept = _kept_tiles(work, chunk, tile, budget)
            shared = work.shared(chunk, tile, kept).tiles
            if shared * tile >= columns and work.peak_bytes(chunk, tile, shared) <= budget:
                best, columns = (chunk, tile, shared), shared * tile
    return best


def _kept_tiles(work: "CpuWork | EvaluationWork | _Work", chunk: int, tile: int, budget: int) -> int:
    """As many as the budget holds."""
    if work.deferred or not work.needs_weight:
        return 0
    tiles = math.ceil(work.vocab / tile)
    if work.peak_bytes(chunk, tile, tiles) <= budget:  # with nothing to compute again, less than with a tile fewer
        return tiles
    return bisect.bisect_left(range(1, tiles), True, key=lambda n: work.peak_bytes(chunk, tile, n) > budget)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the GEMMs' operands.

    A CPU product of half-precision operands rounds its result to half precision; of the same numbers in float32 it is
    exact to float32 and, where the CPU lacks matrix units, several times faster.
    """
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


@dataclass(frozen=True)
class _Work:
    """Sizes of one call, and the bytes that it allocates."""

    rows: int
    positions: int
    hidden: int
    vocab: int
    needs_hidden: bool
    needs_weight: bool
    filtered: bool  # or the entropy's gradient: backward computes all gradients
    item_bytes: int  # bytes of an element of hidden states, weight and saved P
    operand_bytes: int  # bytes of an element as GEMMs read it
    exact_bytes: int  # bytes of an element of logits, statistics and accumulated gradients
    has_softcap: bool
    torch_backend: bool
    inplace: bool  # whether the weight's gradient may overwrite kept P
    device_shapes: tuple[tuple[int, int], tuple[int, int]]  # rows a chunk and columns a tile: at first, and at least

    @property
    def deferred(self) -> bool:
        """Whether backward computes all gradients."""
        return self.filtered

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows a chunk and columns a tile, from the largest down, halved in turn."""
        (chunk, tile), (least_rows, least_columns) = self.device_shapes
        chunk = max(1, math.ceil(self.rows / max(1, math.ceil(self.rows / chunk))))  # chunks of equal size
        tile = min(tile, math.ceil(self.vocab / EDGE) * EDGE)
        least_rows, least_columns = min(chunk, least_rows), min(tile, least_columns)
        found = [(chunk, tile)]
        while tile > least_columns or chunk > least_rows:
            if tile > least_columns and (tile * 2 > chunk or chunk <= least_rows):
                tile = max(least_columns, tile // 2 // EDGE * EDGE)
            else:
                chunk = max(least_rows, math.ceil(chunk / 2))
            found.append((chunk, tile))
        return found

    def peak_bytes(self, chunk: int, tile: int, kept: int) -> int:
        return max(self.forward_bytes(chunk, tile, kept), self.backward_bytes(chunk, tile, kept))

    def forward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Peak of the forward pass: while tiles are walked, or at a chunk's begin or end."""
        differentiates = (self.needs_hidden or kept > 0) and not self.filtered
        walking = 24 * chunk * self.exact_bytes + self._reference_bytes(chunk, tile)
        if self.filtered:
            walking += (self.exact_bytes + 1) * self._columns(tile)
        # Rows of the weight at the labels; the gathering of hidden states.
        with_labels = self.filtered or (differentiates and self.needs_hidden)
        labels_rows = (
            chunk
            * self.hidden
            * (self.exact_bytes + self.item_bytes * (self.item_bytes != self.exact_bytes))
            * with_labels
        )
        gathering = chunk * self.hidden * self.item_bytes * self.converts
        of_chunk = chunk * self.hidden * self.operand_bytes + max(
            gathering, walking, labels_rows + 12 * chunk * self.exact_bytes
        )
        labels = self.rows * (8 + self.exact_bytes) + self.positions
        scratch = self._scratch_bytes(chunk, tile)
        if differentiates and (kept * tile < self.vocab or self.converts):
            scratch += self._grad_logits_bytes(chunk, tile)
        return self.kept_bytes(chunk, tile, kept) + labels + scratch + of_chunk

    def backward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Peak of the backward pass: in the weight's gradient, or in the hidden states'."""
        saved = self.kept_bytes(chunk, tile, kept) + self.rows * (16 + 2 * self.exact_bytes)
        share = (
            chunk
            * self.hidden
            * (self.exact_bytes + self.item_bytes * (self.item_bytes != self.exact_bytes))
            * self.needs_hidden
        )
        if not self.needs_weight and not self.filtered:
            return saved + share
        sums = self.rows * self.hidden * self.exact_bytes * (self.filtered and self.needs_hidden)
        gathered = self.rows * self.hidden * self.operand_bytes
        gathering = self.rows * self.hidden * self.item_bytes * self.converts
        recomputes = self.filtered or kept * tile < self.vocab
        scaled = (chunk if self.converts else self.rows) * self.hidden * self.operand_bytes * self.needs_weight
        several = self.converts or (recomputes and self.rows > chunk)  # products for one tile of the gradient
        item = self.exact_bytes * (self.item_bytes != self.exact_bytes and several)
        apart = self.item_bytes * self.shared(chunk, tile, kept).any_overlaps
        gradient = self._columns(tile) * self.hidden * max(item, apart)
        of_tile = gradient * self.needs_weight + (4 + kept) * self.rows * self.exact_bytes
        if recomputes:
            weight = self._columns(tile) * self.hidden * self.operand_bytes * self.converts
            of_tile += chunk * self._length(tile) * self.exact_bytes + weight
            of_tile += (
                self._reference_bytes(chunk, tile) + self._grad_logits_bytes(chunk, tile) + 8 * chunk * self.exact_bytes
            )
        elif self.converts:
            of_tile += chunk * self._length(tile) * self.operand_bytes
        if self.filtered:
            of_tile += self._chosen_bytes(chunk, tile)
        # The hidden states' gradient is allocated last.
        not_yet = self.positions * self.hidden * self.item_bytes * self.needs_hidden
        return saved + max(share + sums, gathered + sums + max(gathering, scaled + of_tile) - not_yet)

    def kept_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Bytes saved for backward, beyond the memory of the weight's gradient."""
        size = _SMALL + self.rows * (8 + 5 * self.exact_bytes) + self.positions * self.exact_bytes
        size += self.rows * self.hidden * self.exact_bytes * (self.needs_hidden and not self.filtered)
        if self.filtered:
            return size + math.ceil(self.rows / max(1, chunk)) * self.vocab
        columns = row_length(self.vocab) if kept * tile >= self.vocab else kept * tile
        columns -= self.shared(chunk, tile, kept).tiles * tile
        return size + self.rows * (columns * self.item_bytes + kept * self.exact_bytes)

    def gradient_bytes(self) -> int:
        hidden = self.positions * self.hidden * self.item_bytes * self.needs_hidden
        return hidden + self.vocab * self.hidden * self.item_bytes * self.needs_weight

    def shared(self, chunk: int, tile: int, kept: int) -> SharedTiles:
        """The kept tiles whose P lies in the memory of the weight's gradient."""
        largest = self.shapes[0][1]
        if not self.inplace:
            return SharedTiles()
        return SharedTiles.fit(self.rows, tile, self.vocab, self.hidden, kept=kept, largest=largest)

    @property
    def converts(self) -> bool:
        return self.operand_bytes != self.item_bytes

    def _columns(self, tile: int) -> int:
        return min(tile, self.vocab)

    def _length(self, tile: int) -> int:
        return row_length(self._columns(tile))

    def _scratch_bytes(self, chunk: int, tile: int) -> int:
        weight = self._columns(tile) * self.hidden * self.operand_bytes * self.converts
        return chunk * self._length(tile) * self.exact_bytes + weight

    def _grad_logits_bytes(self, chunk: int, tile: int) -> int:
        """A tile of U beside the logits, where it cannot be written over them."""
        return chunk * self._length(tile) * self.operand_bytes * (self.operand_bytes != self.exact_bytes)

    def _chosen_bytes(self, chunk: int, tile: int) -> int:
        """A filter's columns: their numbers, rows of the weight, and those of its gradient."""
        numbers = math.ceil(self.rows / max(1, chunk)) * self.vocab * 8
        row = self.hidden * (self.item_bytes + self.exact_bytes * self.needs_weight)
        return numbers + math.ceil(DENSE_SHARE * self._columns(tile) * row)

    def _reference_bytes(self, chunk: int, tile: int) -> int:
        """The torch reference's own copy of a tile, and beside it a softcap's slope or a filter's magnitudes."""
        beside = max(self.exact_bytes * self.has_softcap, (self.exact_bytes + 1) * self.filtered)
        return chunk * self._columns(tile) * (self.exact_bytes + beside) * self.torch_backend
