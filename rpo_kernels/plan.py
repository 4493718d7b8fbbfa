"""Memory planner of the head level: how to cut the work, what to keep for backward, and what that costs.

Pure arithmetic: `head_tiles` carries out what is planned here, and the command line predicts from it.
"""

import math
import os
import re
from dataclasses import dataclass

import torch

EDGE = 256  # tiles of the vocabulary begin at multiples of this
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Rows a chunk and columns a tile before the budget speaks: large enough for GEMMs at full rate, small enough that a
# tile of logits is still in the last-level cache when the row kernels read it.
_SHAPES = {"cpu": (1024, 2048)}
_ACCELERATOR_SHAPE = (2048, 8192)
_SMALLEST_ROWS, _SMALLEST_COLUMNS = 128, EDGE
# Tiles' worth of temporaries (in float32 or better) that the plain torch definition makes beside the tile itself.
_DEFINITION_TEMPORARIES = 5


@dataclass(frozen=True)
class MemoryPlan:
    """How `linear_token_logprobs` does its work. Bytes are beyond its inputs, its result and their gradients.

    Attributes:
        chunk_rows: scored rows a chunk.
        tile_columns: columns of the vocabulary a tile; logits exist one `[chunk_rows, tile_columns]` tile at a time.
        tiles: tiles that the vocabulary is cut into.
        kept_tiles: tiles whose `d logp / d logits` is kept for the weight's gradient; backward recomputes the others.
        kept_bytes: what waits for backward: the kept tiles, the hidden states' gradient, statistics.
        forward_bytes: peak of the forward pass, kept bytes included.
        backward_bytes: peak of the backward pass, kept bytes included.
        gradient_bytes: the gradients themselves, not counted above.
        head_gemms: `[rows, hidden] x [hidden, vocab]` products, forward and backward, without a column filter.
    """

    chunk_rows: int
    tile_columns: int
    tiles: int
    kept_tiles: int
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
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
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> MemoryPlan:
    """Plan the head level's work within a memory budget.

    Args:
        rows: scored label positions.
        hidden, vocab: H and V, the weight's dimensions.
        dtype: of hidden states and weight.
        needs_hidden, needs_weight: what needs a gradient.
        positions: label positions, scored or not; default `rows`.
        memory_budget: bytes, `"512MB"` (10^6), `"1GiB"` (2^30), or None for a quarter of the device's free memory. It
            bounds `peak_bytes`; a budget below the least that the work needs gives the plan of the least memory.
        gradient_filter: as in `linear_token_logprobs`; only whether there is one is read.
        device: where the work runs.
        backend: `"torch"` counts the temporaries of the plain torch definition, which the other backends do not make.

    Returns:
        `MemoryPlan`.

    Raises:
        ValueError: for negative sizes, a dtype that is not floating, or a budget that cannot be read.
    """
    device = torch.device(device)
    for name, size, least in (("rows", rows, 0), ("hidden", hidden, 1), ("vocab", vocab, 1)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    budget = parse_budget(memory_budget, device)
    work = _Work(
        rows=rows,
        positions=rows if positions is None else positions,
        hidden=hidden,
        vocab=vocab,
        item=dtype.itemsize,
        operand=operand_dtype(dtype, device).itemsize,
        exact=max(4, dtype.itemsize),
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        filtered=gradient_filter is not None,
        defined=backend == "torch",
    )
    chunk, tile = _shape(work, budget, device.type)
    tiles = math.ceil(vocab / tile)
    kept = 0
    if needs_weight:
        spare = budget - max(work.forward_bytes(chunk, tile, 0), work.backward_bytes(chunk, tile, 0))
        kept = max(0, min(tiles, spare // max(1, work.kept_tile_bytes(tile))))
    recomputed = 1 - min(1.0, kept * tile / vocab)
    return MemoryPlan(
        chunk_rows=chunk,
        tile_columns=tile,
        tiles=tiles,
        kept_tiles=kept,
        kept_bytes=work.kept_bytes(tile, kept),
        forward_bytes=work.forward_bytes(chunk, tile, kept),
        backward_bytes=work.backward_bytes(chunk, tile, kept),
        gradient_bytes=work.gradient_bytes(),
        head_gemms=1 + needs_hidden + needs_weight * (1 + recomputed),
    )


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which GEMMs read their operands.

    A CPU product of half-precision operands rounds its result to half precision; of the same numbers in float32 it is
    exact to float32 and, where the CPU lacks matrix units, several times faster.
    """
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype


def parse_budget(memory_budget: int | str | None, device: torch.device) -> int:
    """Bytes of a memory budget; None stands for a quarter of what is free on the device now.

    Raises:
        ValueError: for anything but None, a non-negative integer or a string such as "512MB" or "1.5 GiB".
    """
    if memory_budget is None:
        return _free_bytes(device) // 4
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget >= 0:
        return memory_budget
    if isinstance(memory_budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", memory_budget.upper())
        if match and match[2] in _UNITS:
            return int(float(match[1]) * _UNITS[match[2]])
    raise ValueError(f'memory_budget must be bytes, a string like "512MB" or "1GiB", or None; got {memory_budget!r}')


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        with open("/proc/meminfo") as meminfo:
            return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@dataclass(frozen=True)
class _Work:
    """Sizes of one call, and the bytes of what `head_tiles` allocates for it."""

    rows: int
    positions: int
    hidden: int
    vocab: int
    item: int  # bytes of an element of hidden states, weight and what is kept
    operand: int  # bytes of an element as GEMMs read it
    exact: int  # bytes of an element of logits, statistics and accumulated gradients
    needs_hidden: bool
    needs_weight: bool
    filtered: bool
    defined: bool

    def forward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        needs_gradient = self.needs_hidden or self.needs_weight
        tiles = math.ceil(self.vocab / tile)
        per_row = self.hidden * self.operand + 16 * self.exact
        if needs_gradient:
            per_row += 2 * tiles * self.exact
        if self.needs_hidden:
            # The accumulated gradient, and at the end of a chunk the labels' rows of the weight.
            per_row += self.hidden * (2 * self.exact + self.item)
        else:
            per_row += self.hidden * self.item * (self.item != self.operand)
        return self.kept_bytes(tile, kept) + self._tile_bytes(chunk, tile) + chunk * per_row

    def backward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        if not self.needs_weight:
            return self.kept_bytes(tile, kept) + self.rows * self.hidden * self.exact
        gathered = self.rows * self.hidden * self.operand
        scaled = chunk * self.hidden * self.operand
        gradient = tile * self.hidden * self.exact
        return self.kept_bytes(tile, kept) + self._tile_bytes(chunk, tile) + gathered + scaled + gradient

    def kept_bytes(self, tile: int, kept: int) -> int:
        size = self.positions * 8 + self.rows * 8 * self.exact
        if self.needs_hidden:
            size += self.rows * self.hidden * self.item
        return size + kept * self.kept_tile_bytes(tile)

    def kept_tile_bytes(self, tile: int) -> int:
        return self.rows * (tile * self.item + self.exact)

    def gradient_bytes(self) -> int:
        hidden = self.positions * self.hidden * self.item * self.needs_hidden
        return hidden + self.vocab * self.hidden * self.item * self.needs_weight

    def _tile_bytes(self, chunk: int, tile: int) -> int:
        logits = chunk * tile * self.exact
        weight = tile * self.hidden * self.operand * (self.operand != self.item)
        if self.filtered:
            logits, weight = 2 * logits, weight + tile * self.hidden * self.operand
        if self.defined:
            logits += _DEFINITION_TEMPORARIES * chunk * tile * self.exact
        return logits + weight


def _shape(work: _Work, budget: int, device_type: str) -> tuple[int, int]:
    """Rows a chunk and columns a tile: the device's shape, halved until it takes at most half of the budget."""
    chunk, tile = _SHAPES.get(device_type, _ACCELERATOR_SHAPE)
    chunk = max(1, math.ceil(work.rows / max(1, math.ceil(work.rows / chunk))))  # chunks of equal size
    tile = min(tile, math.ceil(work.vocab / EDGE) * EDGE)
    smallest_chunk = min(chunk, _SMALLEST_ROWS)

    def too_large() -> bool:
        peak = max(work.forward_bytes(chunk, tile, 0), work.backward_bytes(chunk, tile, 0))
        return peak > budget // 2

    while too_large() and (tile > _SMALLEST_COLUMNS or chunk > smallest_chunk):
        if tile > _SMALLEST_COLUMNS and (tile * 2 > chunk or chunk <= smallest_chunk):
            tile = max(_SMALLEST_COLUMNS, tile // 2 // EDGE * EDGE)
        else:
            chunk = max(smallest_chunk, math.ceil(chunk / 2))
    return chunk, tile
