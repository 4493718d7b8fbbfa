"""Memory of P of the tiles that forward saves for the weight's gradient: first in that gradient's, then its own."""

from typing import NamedTuple

from torch import Tensor

from .interface import row_length

_ALIGNMENT = 32  # elements that P of a tile is aligned to


class SharedTiles(NamedTuple):
    """The first kept tiles, whose P lies in the memory of the weight's gradient `[V, H]` until backward.

    They end, up to alignment, where that memory ends. Backward writes the gradient of a tile after reading its P, from
    the first tile on: a tile's gradient ends before the next tile's P begins, and may overlap its own only. This needs
    tiles of at least 31 columns, or rows in multiples of 32 (`tests/test_kept_tiles.py`).
    """

    tiles: int = 0
    first: int = 0  # element of the memory at which P of the first tile begins
    tile_size: int = 0  # elements of P of a tile
    gradient_size: int = 0  # elements of the gradient of a tile

    @classmethod
    def fit(cls, rows: int, columns: int, vocab: int, width: int, *, kept: int, largest: int) -> "SharedTiles":
        """As many of the kept tiles `[rows, columns]` as fit into `[vocab, width]`, counted in tiles of the `largest`
        number of columns, so that the plan gains nothing by smaller ones. None where all tiles would leave more than
        half of that memory empty: forward allocates it whole, and several calls may precede one backward pass."""
        fitting = vocab * width // (rows * largest) * (largest // columns) if rows else 0
        fitting = min(fitting, (vocab - 1) // columns)
        if not kept or 2 * fitting * rows * columns < vocab * width:
            return cls()
        tiles = min(kept, fitting)
        first = (vocab * width - tiles * rows * columns) // _ALIGNMENT * _ALIGNMENT
        return cls(tiles, first, rows * columns, columns * width)

    def start(self, tile: int) -> int:
        """Element at which P of a tile begins."""
        return self.first + tile * self.tile_size

    def overlaps(self, tile: int) -> bool:
        """Whether the gradient of a tile overlaps its own P."""
        return tile < self.tiles and (tile + 1) * self.gradient_size > self.start(tile)

    @property
    def any_overlaps(self) -> bool:
        """Whether one of them does."""
        # By how many elements is linear in the tile, so largest for the first or the last.
        return self.overlaps(0) or self.overlaps(self.tiles - 1)


class KeptTiles(NamedTuple):
    """Rows of the first tiles of a matrix `[N, V]`, tile after tile."""

    memory: Tensor  # flat
    grad_weight: Tensor  # [V, H], with the shared tiles
    shared: SharedTiles
    rows: int  # N
    vocab: int  # V
    tile_columns: int
    tiles: int
    span: slice  # of the rows

    @classmethod
    def size(cls, rows: int, vocab: int, tile_columns: int, tiles: int, shared: int) -> int:
        """Elements of `memory`, for the tiles beyond the shared ones."""
        if tiles == shared:
            return 0
        last = min(tile_columns, vocab - tile_columns * (tiles - 1))
        return rows * ((tiles - 1 - shared) * tile_columns + row_length(last))

    def of_rows(self, span: slice) -> "KeptTiles":
        """Some rows of it."""
        return self._replace(span=span)

    def tile(self, number: int) -> Tensor:
        """One tile, `[n, v]`."""
        return self._padded(number)[self.span, : self.vocab - number * self.tile_columns]

    def clear_padding(self) -> None:
        """Write 0 after the last columns, so that the same input gives the same memory."""
        if self.tiles:
            self._padded(self.tiles - 1)[:, self.vocab - (self.tiles - 1) * self.tile_columns :].zero_()

    def _padded(self, number: int) -> Tensor:
        if number < self.shared.tiles:
            memory, start = self.grad_weight.view(-1), self.shared.start(number)
        else:
            memory, start = self.memory, self.rows * (number - self.shared.tiles) * self.tile_columns
        length = row_length(min(self.tile_columns, self.vocab - number * self.tile_columns))
        return memory[start : start + self.rows * length].view(self.rows, length)
