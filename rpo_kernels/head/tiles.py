"""One tile of logits: the head as given, memory to work in, and memory for what is kept."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import ActiveColumns, RowStats, TokenOptions
from . import gemm
from .plan import MemoryPlan, operand_dtype
from .schedule import Place, Schedule


class Head(NamedTuple):
    """The head as given: hidden states `[M, H]`, weight `[V, H]`, bias `[V]`, and how its logits are read."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    options: TokenOptions
    backend: str | None

    @property
    def operand_dtype(self) -> torch.dtype:
        """As GEMMs read their operands."""
        return operand_dtype(self.weight.dtype, self.weight.device)

    @property
    def exact_dtype(self) -> torch.dtype:
        """Of statistics and accumulated gradients."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def logits_dtype(self) -> torch.dtype:
        """As GEMMs write the logits: exact, unless the device cannot from half-precision operands."""
        mixed = gemm.results_in_float32(self.weight.device.type, self.operand_dtype)
        return self.exact_dtype if mixed else self.operand_dtype

    @property
    def backend_name(self) -> str:
        """The backend that will serve tiles of logits."""
        return dispatch.choose(self.weight.new_empty(0, dtype=self.logits_dtype), self.backend)

    def gather(self, positions: Tensor) -> Tensor:
        """Hidden states that predict the labels at these positions, `[n, H]`, as GEMMs read them."""
        return self.hidden.index_select(0, positions - int(self.options.shift)).to(self.operand_dtype)

    def row_stats(self, logits: Tensor, labels: Tensor, first_column: int, running: RowStats | None) -> RowStats:
        """The backend's `row_stats` of a tile `[n, v]` of scored rows."""
        kernels = dispatch.rows(logits, self.backend)
        return kernels.row_stats(logits[None], labels[None], self.options._replace(shift=False), first_column, running)

    def row_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        first_column: int,
        out: Tensor,
        active: ActiveColumns | None = None,
    ) -> Tensor:
        """The backend's `row_grad` of a tile `[n, v]` of scored rows."""
        kernels = dispatch.rows(logits, self.backend)
        options, ones = self.options._replace(shift=False), torch.ones_like(stats.logp)
        kernels.row_grad(logits[None], labels[None], stats, ones, options, first_column, out[None], active)
        return out

    def operand_like(self, logits: Tensor) -> Tensor:
        """Where to write the U of a tile for GEMMs to read it: over the logits if it is of their dtype."""
        return logits if logits.dtype == self.operand_dtype else torch.empty_like(logits, dtype=self.operand_dtype)


class Scratch:
    """Memory for one tile of logits and, where GEMMs read another dtype, one tile of the weight."""

    def __init__(self, head: Head, schedule: Schedule):
        rows, vocab, chunk, tile = schedule.sizes
        self.head, self.size = head, min(rows, chunk) * min(vocab, tile)
        converts = head.operand_dtype != head.weight.dtype
        size = min(vocab, tile) * head.weight.shape[1] if converts else 0
        self.weight = head.weight.new_empty(size, dtype=head.operand_dtype)

    @functools.cached_property
    def logits(self) -> Tensor:
        """Made when first used: backward needs none if it reads all U where it was kept."""
        return self.head.weight.new_empty(self.size, dtype=self.head.logits_dtype)

    def load(self, columns: slice) -> Tensor:
        """A tile of the weight, `[v, H]`, as GEMMs read it."""
        weight = self.head.weight[columns]
        if self.weight.dtype == weight.dtype:
            return weight
        return self.weight[: weight.numel()].view(weight.shape).copy_(weight)

    def multiply(self, hidden: Tensor, weight: Tensor, columns: slice) -> Tensor:
        """The logits of a chunk and tile, `[n, v]`."""
        logits = self.tile(len(hidden), len(weight))
        gemm.matmul(hidden, weight.T, logits)
        return logits if self.head.bias is None else logits.add_(self.head.bias[columns])

    def tile(self, rows: int, columns: int) -> Tensor:
        """Uninitialised memory of the tile of logits."""
        return self.logits[: rows * columns].view(rows, columns)


class KeptTiles:
    """Memory for what is kept of the tiles."""

    def __init__(self, head: Head, schedule: Schedule, plan: MemoryPlan, filtered: bool):
        rows, vocab, *_ = schedule.sizes
        self.schedule, self.filtered = schedule, filtered
        # A filter fills the same memory with parts of more tiles.
        self.tiles = plan.tiles if filtered and plan.kept_tiles else plan.kept_tiles
        self.kept = head.hidden.new_empty(rows * min(vocab, plan.kept_tiles * plan.tile_columns))
        columns = len(schedule.chunks) * vocab if filtered and plan.kept_tiles else 0
        self.columns = head.hidden.new_empty(columns, dtype=torch.int32)
        self.used = self.used_columns = 0

    def place(self, chunk: int, tile: int, columns: Tensor | None = None) -> Tensor | None:
        """Memory for the U of a chunk and tile, or of these columns of it; None if there is no room."""
        rows, span = self.schedule.chunks[chunk], self.schedule.tiles[tile]
        shape = (rows.stop - rows.start, span.stop - span.start if columns is None else len(columns))
        offset = self.used
        if not self.filtered:  # tile after tile, each with all rows
            offset = self.schedule.sizes[0] * span.start + rows.start * shape[1]
        end = offset + shape[0] * shape[1]
        if tile >= self.tiles or end > self.kept.numel():
            return None
        self.used = end
        place = Place(offset)
        if columns is not None:
            place = Place(offset, self.used_columns, len(columns))
            self.used_columns += len(columns)
            self.columns[place.columns_offset : self.used_columns] = columns
        self.schedule.places[chunk][tile] = place
        return self.kept[offset:end].view(shape)

    def filled(self) -> tuple[Tensor, Tensor]:
        """What was kept, and the columns of it."""
        if not self.filtered:
            return self.kept, self.columns
        return self.kept[: self.used], self.columns[: self.used_columns]
