"""Backward over tiles of logits: gradients of hidden states, weight and bias from the saved tensors; docs/head.md.

For a saved tile, `dW = (s P)^T (-c hidden)`: the scale s and the loss's factor c of a row multiply the hidden states.
For other tiles U = dlogp/dlogit is recomputed, for all columns or those that the filter marked, and
`dW = U^T (c hidden)`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import EntropyGrad, RowStats
from ..kernels.kept import KeptTiles
from . import gemm
from .plan import DENSE_SHARE
from .schedule import Needs, Saved, Schedule, spans
from .tiles import Head, Scratch


def backward(
    head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the hidden states, the weight and the bias; empty where not needed."""
    loss = _Loss.of_rows(saved, grad_logps, grad_entropy)
    factor = loss.factor
    sums = saved.grad_hidden
    grad_weight = head.weight.new_empty(0)
    if needs.weight:
        grad_weight = saved.grad_weight if needs.inplace else torch.empty_like(head.weight)
    grad_bias = head.weight.new_empty(len(head.weight)) if needs.bias else head.weight.new_empty(0)
    if needs.weight or needs.bias or needs.deferred:
        walk = _Tiles(head, saved, labels, loss, needs)
        walk.run(grad_weight, grad_bias)
        sums = saved.grad_hidden if walk.sums is None else walk.sums
        del walk
    if not needs.hidden:
        return head.hidden.new_empty(0), grad_weight, grad_bias
    grad_hidden = torch.zeros_like(head.hidden)
    index = saved.positions - int(head.options.shift)
    for span in Schedule.load(saved.schedule).chunks:
        grad_hidden.index_copy_(0, index[span], (sums[span] * factor[span, None]).to(grad_hidden.dtype))
    return grad_hidden, grad_weight, grad_bias


class _Loss(NamedTuple):
    """Gradients of the loss by row, as `factor` times normalised ones: the accuracy of half-precision U then does not
    depend on the loss's scale."""

    factor: Tensor  # [N], of a row of U
    logp: Tensor  # [N]: dL/dlogp / factor
    entropy: EntropyGrad | None = None  # [N] each: dL/dentropy / factor

    @classmethod
    def of_rows(cls, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None) -> "_Loss":
        """From the gradients of all positions."""
        of_logp = grad_logps.flatten()[saved.positions]
        if grad_entropy is None:
            return cls(of_logp, torch.ones_like(of_logp))
        of_entropy = grad_entropy.flatten()[saved.positions]
        factor = torch.maximum(of_logp.abs(), of_entropy.abs())
        factor = torch.where(factor > 0, factor, 1)
        return cls(factor, of_logp / factor, EntropyGrad(saved.stats[4], of_entropy / factor))

    def row_grad(self, rows: slice) -> tuple[Tensor, EntropyGrad | None]:
        """What `row_grad` takes of these rows."""
        entropy = None if self.entropy is None else EntropyGrad(*(x[None, rows] for x in self.entropy))
        return self.logp[None, rows], entropy


class _Piece(NamedTuple):
    """A part of U, `[n, v]`, up to a factor of each row."""

    grad_logits: Tensor
    rows: slice
    factor: Tensor  # [N], the loss's included, of all rows
    weight: Tensor | None = None  # [v, H], where U was computed again
    columns: Tensor | None = None  # [v] of the tile's, or None for all


class _Tiles:
    """Computes all tiles in turn: all rows of a tile at once if its P was saved, else chunk by chunk."""

    def __init__(self, head: Head, saved: Saved, labels: Tensor, loss: _Loss, needs: Needs):
        self.head, self.loss = head, loss
        self.factors = saved.references * -loss.factor  # [kept tiles, N]
        self.schedule = schedule = Schedule.load(saved.schedule)
        layout = (schedule.rows, schedule.vocab, schedule.tile, schedule.kept_tiles)
        self.kept = KeptTiles(saved.kept, saved.grad_weight, schedule.shared, *layout, slice(0, schedule.rows))
        self.inplace = needs.inplace
        self.scratch = Scratch(head, schedule)
        self.labels = labels.flatten()[saved.positions].long()
        self.hidden = head.gather(saved.positions)
        self.stats = saved.stats
        self.filter = _Active(saved.active, schedule, self.labels) if needs.filtered else None
        self.sums: Tensor | None = None
        if needs.deferred and needs.hidden:
            self.sums = self.hidden.new_zeros(self.hidden.shape, dtype=head.exact_dtype)

    def run(self, grad_weight: Tensor, grad_bias: Tensor) -> None:
        """Fill the gradients that are not empty, and `sums`."""
        of_weight, of_bias = TileSum(grad_weight, self.head), TileSum(grad_bias[:, None], self.head)
        totals = [total for total in (of_weight, of_bias) if len(total.gradient)]
        most_rows = self.schedule.chunk if self.scratch.converts else self.schedule.rows
        scaled = _ScaledRows(self.head, self.hidden, most_rows if of_weight in totals else 0)
        schedule = self.schedule
        for tile, columns in enumerate(schedule.tiles):
            was_kept = tile < self.kept.tiles
            pieces = self._of_kept(tile) if was_kept else self._recomputed(tile)
            products = len(schedule.chunks) if self.scratch.converts or not was_kept else 1
            for total in totals:
                overlaps = self.inplace and total is of_weight and schedule.shared.overlaps(tile)
                total.begin(columns, products, apart=overlaps)
            for piece in pieces:
                if of_weight in totals:
                    of_weight.add(piece.grad_logits.T, scaled.take(piece.rows, piece.factor), piece.columns)
                if of_bias in totals:
                    of_bias.add(
                        piece.grad_logits.T, piece.factor[piece.rows, None].to(piece.grad_logits.dtype), piece.columns
                    )
                if self.sums is not None and piece.weight is not None:
                    gemm.add_matmul(self.sums[piece.rows], piece.grad_logits, piece.weight)
            for total in totals:
                total.finish()

    def _of_kept(self, tile: int) -> Iterator[_Piece]:
        probabilities = self.kept.tile(tile)
        factor = self.factors[tile]
        for rows in (
            self.schedule.chunks if self.scratch.converts else spans(self.schedule.rows, max(1, self.schedule.rows))
        ):
            grad_logits = probabilities[rows]
            if self.scratch.converts:
                grad_logits = self.scratch.grad_logits(*grad_logits.shape).copy_(grad_logits)
            yield _Piece(grad_logits, rows, factor)

    def _recomputed(self, tile: int) -> Iterator[_Piece]:
        columns = self.schedule.tiles[tile]
        for number, rows in enumerate(self.schedule.chunks):
            labels, first, chosen = self.labels[rows], columns.start, None
            if self.filter is not None:
                labels, first, chosen = self.filter.choose(number, tile)
            if chosen is not None and len(chosen) == 0:
                continue
            weight = self.scratch.load(columns, chosen)
            logits = self.scratch.logits(self.hidden[rows], weight, columns, chosen)
            grad_logits = self.scratch.grad_logits(*logits.shape)
            stats = RowStats(*self.stats[:4, None, rows])
            of_logp, entropy = self.loss.row_grad(rows)
            arguments = (logits[None], labels[None], stats, of_logp, self.head.row_options, first, grad_logits[None])
            self.head.kernels.row_grad(*arguments, entropy=entropy)
            yield _Piece(grad_logits, rows, self.loss.factor, weight, chosen)


class _ScaledRows:
    """Hidden states times a factor of each row, as GEMMs read them."""

    def __init__(self, head: Head, hidden: Tensor, most_rows: int):
        self.head, self.hidden = head, hidden
        self.out = torch.empty_like(hidden[:most_rows])
        self.factor: Tensor | None = None  # of which `out` is full

    def take(self, rows: slice, factor: Tensor) -> Tensor:
        """`factor * hidden` of some rows, given the factors `[N]` of all; reused while they are the same tensor."""
        if len(self.out) < len(self.hidden):
            out = self.out[: rows.stop - rows.start]
            self.head.softmax.scale_rows(self.hidden[rows], factor[rows], None, out)
            return out
        if factor is not self.factor:
            self.head.softmax.scale_rows(self.hidden, factor, self.factor, self.out)
            self.factor = factor
        return self.out[rows]


class _Active:
    """The columns that the filter marked, numbered chunk by chunk, and the number of each label."""

    def __init__(self, active: Tensor, schedule: Schedule, labels: Tensor):
        self.schedule, self.labels, vocab = schedule, labels, schedule.vocab
        self.columns = active.nonzero().squeeze(1)  # synchronises here,
        edges = [chunk * vocab + tile.start for chunk in range(len(schedule.chunks)) for tile in schedule.tiles]
        edges.append(len(active))
        self.bounds = torch.searchsorted(
            self.columns, torch.tensor(edges, dtype=torch.int64, device=labels.device)
        ).tolist()  # and here
        # A label's column is always marked, so that this is its number; a label out of range gets -1.
        column = labels.clamp(0, vocab - 1)
        chunk_of_row = torch.arange(len(labels), device=labels.device) // schedule.chunk
        numbers = torch.searchsorted(self.columns, chunk_of_row * vocab + column)
        self.numbers = torch.where(column == labels, numbers, -1)

    def choose(self, chunk: int, tile: int) -> tuple[Tensor, int, Tensor | None]:
        """Labels, first column and active columns of a tile, counted from its first; all, where most are active."""
        at = chunk * len(self.schedule.tiles) + tile
        start, stop = self.bounds[at : at + 2]
        rows, columns = self.schedule.chunks[chunk], self.schedule.tiles[tile]
        if stop - start > DENSE_SHARE * (columns.stop - columns.start):
            return self.labels[rows], columns.start, None
        return self.numbers[rows], start, self.columns[start:stop] - (chunk * self.schedule.vocab + columns.start)


class TileSum:
    """The gradient of one tile, summed exactly and rounded once."""

    def __init__(self, gradient: Tensor, head: Head):
        self.gradient, self.exact_dtype, self.operand_dtype = gradient, head.exact_dtype, head.operand_dtype
        self.memory: Tensor | None = None

    def begin(self, columns: slice, products: int, apart: bool = False) -> None:
        """Turn to another tile, of as many products; `apart` if the gradient must not be written before `finish`."""
        self.out = self.gradient[columns]
        self.total, self.empty = self.out, True
        rounds_once = products == 1 and self.out.dtype == self.operand_dtype
        dtype = self.out.dtype if rounds_once else self.exact_dtype
        if self.out.dtype == dtype and not apart:
            return
        if self.memory is None or self.memory.dtype != dtype:  # the first tile is the largest
            self.memory = None
            self.memory = torch.empty_like(self.out, dtype=dtype)
        self.total = self.memory[: len(self.out)]

    def add(self, left: Tensor, right: Tensor, rows: Tensor | None) -> None:
        """Add a product, to these rows if given."""
        if rows is not None:
            product = left.new_empty(len(left), right.shape[1], dtype=self.total.dtype)
            gemm.matmul(left, right, product)
            self._filled().index_add_(0, rows, product)
        elif self.empty:
            gemm.matmul(left, right, self.total)
        else:
            gemm.add_matmul(self.total, left, right)
        self.empty = False

    def finish(self) -> None:
        """Round to the gradient's dtype."""
        total = self._filled()
        if total is not self.out:
            self.out.copy_(total)

    def _filled(self) -> Tensor:
        if self.empty:
            self.total.zero_()
            self.empty = False
        return self.total
