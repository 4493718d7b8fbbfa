"""Chunks, tiles and bytes of the CPU implementation; pure arithmetic."""

import math
from dataclasses import dataclass

from ...kernels.kept import SharedTiles
from ...kernels.native_head import PANEL, STRIP, Buffers, panels

LABEL_ROWS = 128  # rows whose labels' terms are computed at once
# Rows a chunk and columns a tile: packed operands are read from caches.
_SHAPES = ((1024, 2016), (1024, 1008), (1024, 504), (512, 504), (512, 252), (256, 252), (128, 252))
# Bytes per row beside its hidden state.
_A_ROW_FORWARD, _A_ROW_OUTPUTS, _A_ROW_BACKWARD = 88, 120, 80
_SMALL = 4096  # tensors of a few numbers


def padded_rows(rows: int, chunk: int) -> int:
    """Rows in chunks, each padded to whole panels."""
    whole, last = divmod(rows, chunk)
    return (whole * panels(chunk) + panels(last)) * PANEL


@dataclass(frozen=True)
class CpuWork:
    """Sizes of one call, and the bytes that it allocates."""

    rows: int
    positions: int
    hidden: int
    vocab: int
    needs_hidden: bool
    needs_weight: bool
    filtered: bool
    entropy: bool  # whether it has a gradient
    outputs: int
    inplace: bool  # whether the weight's gradient may overwrite kept P

    @property
    def deferred(self) -> bool:
        """Whether backward computes all gradients."""
        return self.filtered or self.entropy

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows a chunk and columns a tile, from the largest down."""
        return [self._fitted(*shape) for shape in _SHAPES]

    def _fitted(self, chunk: int, tile: int) -> tuple[int, int]:
        chunks = max(1, math.ceil(self.rows / chunk))  # of equal size
        chunk = math.ceil(math.ceil(self.rows / chunks) / 32) * 32
        return max(1, min(chunk, self.rows)), min(tile, math.ceil(self.vocab / STRIP) * STRIP)

    def peak_bytes(self, chunk: int, tile: int, kept: int) -> int:
        return max(self.forward_bytes(chunk, tile, kept), self.backward_bytes(chunk, tile, kept))

    def forward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Peak of the forward pass."""
        shapes, differentiates = Buffers(chunk, tile, self.hidden), self.needs_hidden and not self.deferred
        of_tile = self._tile_bytes(shapes, pairs=differentiates, grad_logits=self.filtered)
        hidden, label_rows = chunk * self.hidden * 2, min(chunk, LABEL_ROWS) * self.hidden
        lanes, gradient = 4 * math.prod(shapes.lanes), 4 * math.prod(shapes.gradient) * differentiates
        packing = hidden + max(label_rows * 14, lanes + gradient)
        ending = lanes + gradient + max(gradient, label_rows * 6 * differentiates)
        chunk_bytes = chunk * (_A_ROW_FORWARD + _A_ROW_OUTPUTS * (self.outputs > 0)) + max(packing, ending)
        results = self.rows * (8 + 4 * self.outputs)
        return self.kept_bytes(chunk, tile, kept) + results + of_tile + chunk_bytes

    def backward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Peak of the backward pass."""
        saved = self.kept_bytes(chunk, tile, kept) + self.rows * 24
        ending = chunk * self.hidden * 6 * self.needs_hidden
        if not (self.needs_weight or self.deferred):
            return saved + ending
        recomputes, chunks = kept * tile < self.vocab, math.ceil(self.rows / chunk)
        shapes = Buffers(padded_rows(self.rows, chunk), tile, self.hidden)  # of all chunks
        differentiates = self.needs_hidden and self.deferred
        of_rows = self.rows * (self.hidden * 2 + _A_ROW_BACKWARD)
        of_rows += 4 * math.prod(shapes.lanes) * recomputes
        of_rows += 4 * math.prod(shapes.elements) * self.needs_weight
        of_rows += 4 * math.prod(shapes.gradient) * differentiates
        shapes = shapes._replace(rows=chunk)
        of_tile = self._tile_bytes(shapes, pairs=differentiates, grad_logits=recomputes) if recomputes else 0
        item = 4 if chunks > 1 else 2 * self.shared(chunk, tile, kept).any_overlaps
        apart = item * min(tile, self.vocab) * self.hidden * self.needs_weight
        ending = (4 * math.prod(shapes.gradient) + chunk * self.hidden * 4) * differentiates
        return saved + of_rows + of_tile + apart + ending

    def kept_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Bytes saved for backward, beyond the memory of the weight's gradient."""
        chunks = math.ceil(self.rows / chunk)
        size = _SMALL + self.rows * (24 + 8 * self.entropy) + self.positions * 8
        size += self.rows * self.hidden * 4 * (self.needs_hidden and not self.deferred)
        size += chunks * self.vocab * self.filtered
        shared = self.shared(chunk, tile, kept).tiles
        columns = min(math.ceil(self.vocab / STRIP) * STRIP, kept * tile) - shared * tile
        return size + kept * self.rows * 4 + 2 * padded_rows(self.rows, chunk) * columns

    def shared(self, chunk: int, tile: int, kept: int) -> SharedTiles:
        """The kept tiles whose P lies in the memory of the weight's gradient."""
        if not self.inplace:
            return SharedTiles()
        rows, largest = padded_rows(self.rows, chunk), max(tile, _SHAPES[0][1])
        return SharedTiles.fit(rows, tile, self.vocab, self.hidden, kept=kept, largest=largest)

    def gradient_bytes(self) -> int:
        """The gradients themselves."""
        return 2 * (self.positions * self.hidden * self.needs_hidden + self.vocab * self.hidden * self.needs_weight)

    def _tile_bytes(self, shapes: Buffers, *, pairs: bool, grad_logits: bool) -> int:
        """Packed operands of a tile, and the numbers of its columns."""
        size = math.prod(shapes.weight) + math.prod(shapes.pairs) * pairs + math.prod(shapes.grad_logits) * grad_logits
        return 4 * size + 32 * shapes.columns
