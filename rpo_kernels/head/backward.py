"""Backward walk: the gradients of the hidden states, the weight and the bias from what forward saved."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.interface import RowStats
from . import gemm
from .schedule import Needs, Place, Saved, Schedule
from .tiles import Head, Scratch


def backward(
    head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the hidden states, the weight and the bias; empty where not needed."""
    hidden = _hidden(head, saved, grad_logps) if needs.hidden else head.hidden.new_empty(0)
    if needs.weight or needs.bias:
        return hidden, *_weight_and_bias(head, saved, labels, grad_logps, needs.weight, needs.bias)
    return hidden, head.weight.new_empty(0), head.weight.new_empty(0)


def _hidden(head: Head, saved: Saved, grad_logps: Tensor) -> Tensor:
    """Gradient of the hidden states `[M, H]`."""
    gradient = torch.zeros_like(head.hidden)
    index, factor = saved.positions - int(head.options.shift), grad_logps.flatten()[saved.positions]
    for span in Schedule.load(saved.schedule).chunks:
        gradient.index_copy_(0, index[span], (saved.unit[span] * factor[span, None]).to(gradient.dtype))
    return gradient


def _weight_and_bias(
    head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight `[V, H]` and the bias `[V]`; empty where not needed."""
    gradients = (
        torch.empty_like(head.weight) if needs_weight else head.weight.new_empty(0),
        head.weight.new_empty(len(head.weight)) if needs_bias else head.weight.new_empty(0),
    )
    walk = _Backward(head, saved, labels, grad_logps)
    # dW = U^T (c hidden) and db = U^T c.
    wanted = []
    if needs_weight:
        wanted.append((_TileSum(gradients[0], walk.schedule, head.exact_dtype), walk.hidden))
    if needs_bias:
        ones = walk.hidden.new_ones(len(walk.hidden), 1)
        wanted.append((_TileSum(gradients[1][:, None], walk.schedule, head.exact_dtype), ones))
    for tile, columns in enumerate(walk.schedule.tiles):
        for total, _ in wanted:
            total.begin(columns)
        for rows, place in walk.pieces(tile):
            unit, active = walk.unit(tile, rows, place)
            scale, own, gain = walk.factors(tile, rows, place)
            for total, right in wanted:
                total.add(unit.T, (right[rows] * scale[:, None]).to(unit.dtype), active)
                total.add_rows(walk.labels[own] - columns.start, right[own] * gain[:, None])
            del unit  # or it would wait while the next one is made
        for total, _ in wanted:
            total.finish()
    return gradients


class _Backward:
    """What the weight's gradient is made of: U of each tile, kept or computed again, and the rows' factors."""

    def __init__(self, head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor):
        self.head, self.saved = head, saved
        self.schedule = Schedule.load(saved.schedule)
        self.scratch = Scratch(head, self.schedule)
        self.hidden = head.gather(saved.positions)
        self.labels = labels.flatten()[saved.positions]
        self.factor = grad_logps.flatten()[saved.positions]

    def pieces(self, tile: int) -> Iterator[tuple[slice, Place]]:
        """The rows of a tile, all at once where their U lies as one and is read as it lies, else chunk by chunk."""
        chunks, places = self.schedule.chunks, [chunk[tile] for chunk in self.schedule.places]
        size = self.schedule.tiles[tile].stop - self.schedule.tiles[tile].start
        as_one = [Place(places[0].offset + rows.start * size) for rows in chunks]
        if places and places[0].offset >= 0 and places == as_one and self.saved.kept.dtype == self.hidden.dtype:
            yield slice(0, len(self.hidden)), places[0]
        else:
            yield from zip(chunks, places)

    def unit(self, tile: int, rows: slice, place: Place) -> tuple[Tensor, Tensor | None]:
        """U of these rows as GEMMs read it, and which of the tile's columns it has; None stands for all."""
        columns, kept = self.schedule.tiles[tile], self.saved.kept
        if place.offset < 0:
            logits = self.scratch.multiply(self.hidden[rows], self.scratch.load(columns), columns)
            logp, top, sumexp, _ = self.saved.stats[:, None, rows]
            stats, out = RowStats(logp, top, sumexp, logp), self.head.operand_like(logits)
            return self.head.row_grad(logits, self.labels[rows], stats, columns.start, out), None
        shape = (rows.stop - rows.start, columns.stop - columns.start if place.columns < 0 else place.columns)
        unit = kept[place.offset : place.offset + shape[0] * shape[1]].view(shape)
        if unit.dtype != self.hidden.dtype:
            unit = self.scratch.tile(*shape).copy_(unit)
        if place.columns < 0:
            return unit, None
        return unit, self.saved.active.view(torch.int32)[place.columns_offset : place.columns_offset + place.columns]

    def factors(self, tile: int, rows: slice, place: Place) -> tuple[Tensor, slice, Tensor]:
        """The loss's factor and s of these rows; those whose label lies in the tile, and the loss's factor and gain
        of those. What is computed again needs neither s nor a gain."""
        if place.offset < 0:
            return self.factor[rows], slice(0, 0), self.factor[:0]
        own = self.schedule.label_rows(rows, tile)
        scale = self.saved.references[tile, rows].exp().mul_(self.factor[rows])
        return scale, own, self.saved.stats[3, own] * self.factor[own]


class _TileSum:
    """The gradient's tile at hand, summed exactly and rounded once."""

    def __init__(self, gradient: Tensor, schedule: Schedule, dtype: torch.dtype):
        self.gradient = gradient
        columns = min(schedule.sizes[1], schedule.sizes[3])
        self.memory = None if gradient.dtype == dtype else gradient.new_empty(columns, gradient.shape[1], dtype=dtype)

    def begin(self, columns: slice) -> None:
        """Turn to another tile."""
        self.out = self.gradient[columns]
        self.exact = self.out if self.memory is None else self.memory[: len(self.out)]
        self.empty = True

    def add(self, left: Tensor, right: Tensor, rows: Tensor | None) -> None:
        """Add a product, to these rows if given."""
        if rows is not None:
            product = left.new_empty(len(left), right.shape[1], dtype=self.exact.dtype)
            gemm.matmul(left, right, product)
            self._filled().index_add_(0, rows, product)
        elif self.empty:
            gemm.matmul(left, right, self.exact)
        else:
            gemm.add_matmul(self.exact, left, right)
        self.empty = False

    def add_rows(self, index: Tensor, values: Tensor) -> None:
        """Add values to rows, of which one may occur often; in a fixed order."""
        if len(index) == 0:
            return
        if values.is_cuda:
            self._filled().index_put_((index,), values, accumulate=True)
        else:
            self._filled().index_add_(0, index, values)

    def finish(self) -> None:
        """Round to the gradient's dtype."""
        total = self._filled()
        if total is not self.out:
            self.out.copy_(total)

    def _filled(self) -> Tensor:
        if self.empty:
            self.exact.zero_()
            self.empty = False
        return self.exact
