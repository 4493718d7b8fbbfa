"""Shared by forward and backward: chunks and tiles, and memory for packed operands."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import native_head
from ...kernels.kept import SharedTiles
from ...kernels.native_head import STRIP, Buffers, Tile
from ..schedule import spans
from ..tiles import Head
from .plan import padded_rows


class Cuts(NamedTuple):
    """Chunks of rows, tiles of columns, and the tiles whose P is saved."""

    rows: int
    vocab: int
    width: int
    chunk_rows: int
    tile_columns: int
    kept_tiles: int
    shared: SharedTiles  # of the kept ones

    def dump(self) -> Tensor:
        """As one tensor, for an operator to return."""
        return torch.tensor([*self[:-1], *self.shared], dtype=torch.int64, device="cpu")

    @classmethod
    def load(cls, packed: Tensor) -> "Cuts":
        """Back from `dump`."""
        rows, vocab, width, chunk_rows, tile_columns, kept_tiles, *shared = packed.tolist()
        return cls(rows, vocab, width, chunk_rows, tile_columns, kept_tiles, SharedTiles(*shared))

    @property
    def chunks(self) -> list[slice]:
        return spans(self.rows, self.chunk_rows)

    @property
    def tiles(self) -> list[slice]:
        return spans(self.vocab, self.tile_columns)

    @property
    def buffers(self) -> Buffers:
        """Shapes for the largest chunk and tile."""
        return Buffers(min(self.rows, self.chunk_rows), min(self.vocab, self.tile_columns), self.width)

    def kept(self, memory: Tensor, grad_weight: Tensor, tile: int, chunk: int) -> Tensor:
        """Saved P of a chunk and tile, packed; stored tile after tile, each with all its chunks."""
        if tile < self.shared.tiles:
            start, memory = self.shared.start(tile), grad_weight.view(-1)
        else:
            start = (tile - self.shared.tiles) * self.tile_columns * padded_rows(self.rows, self.chunk_rows)
        columns, first = self._strip_columns(tile), chunk * self.chunk_rows
        start += columns * padded_rows(first, self.chunk_rows)
        size = columns * padded_rows(min(self.chunk_rows, self.rows - first), self.chunk_rows)
        return memory[start : start + size].view(torch.int32)

    def kept_size(self) -> int:
        """Elements of saved P outside the memory of the weight's gradient."""
        if self.kept_tiles == self.shared.tiles:
            return 0
        last = self.kept_tiles - 1
        columns = (last - self.shared.tiles) * self.tile_columns + self._strip_columns(last)
        return columns * padded_rows(self.rows, self.chunk_rows)

    def _strip_columns(self, tile: int) -> int:
        """Columns of a tile, padded to strips; only the last tile may differ from `tile_columns`."""
        columns = min(self.tile_columns, self.vocab - tile * self.tile_columns)
        return -(-columns // STRIP) * STRIP


class Work:
    """Memory for the packed operands of one tile."""

    def __init__(self, head: Head, cuts: Cuts, *, weight: bool = True, pairs: bool, grad_logits: bool):
        self.head, self.cuts = head, cuts
        shapes = cuts.buffers
        self.weight_rows = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.weight = self.packed(shapes.weight if weight else (0,))
        self.pairs = self.packed(shapes.pairs) if pairs else None
        self.grad_logits = self.packed(shapes.grad_logits) if grad_logits else None
        self.bias = None if head.bias is None else head.bias.float()

    def packed(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised packed operands."""
        return self.head.hidden.new_empty(shape, dtype=torch.int32)

    def tile(self, columns: slice, index: Tensor | None, lanes: Tensor, labels: Tensor, rows: int) -> Tile:
        """Pack columns of the weight, or those of an index relative to the first of them."""
        weight = self.weight_rows[columns]
        native_head.pack_weight(weight, index, self.weight, self.pairs)
        bias = None if self.bias is None else self.bias[columns]
        if bias is not None and index is not None:
            bias = bias[index]
        count = len(weight) if index is None else len(index)
        return Tile(lanes, self.weight, labels, rows, count, self.cuts.width, self.head.options, bias, self.pairs)


def gather(head: Head, positions: Tensor) -> Tensor:
    """Hidden states that predict the labels at these positions, `[n, H]`."""
    return head.hidden.index_select(0, positions - int(head.options.shift))


def padded(x: Tensor, fill: float) -> Tensor:
    """Padded to whole panels."""
    result = x.new_full((native_head.panels(len(x)) * native_head.PANEL,), fill)
    result[: len(x)] = x
    return result


def unpacked(gradient: Tensor, rows: int, width: int) -> Tensor:
    """`[n, H]` from the packed gradient of the hidden states."""
    panels, parts, strip, panel = gradient.shape
    return gradient.permute(0, 3, 1, 2).reshape(panels * panel, parts * strip)[:rows, :width]
