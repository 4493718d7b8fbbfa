"""Backward: gradients of weight and bias, and the hidden states' gradient where forward did not compute it."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import native_head
from ...kernels.interface import TokenOptions
from ...kernels.native_head import Finished, LabelGain, Tile
from ..schedule import Needs, Saved, spans
from ..tiles import Head
from .plan import LABEL_ROWS
from .work import Cuts, Work, gather, padded, unpacked


def backward(
    head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states `[M, H]`, weight `[V, H]` and bias `[V]`; empty where not needed."""
    walk = _Backward(head, saved, labels, _Loss.of_rows(saved, grad_logps, grad_entropy, head.options), needs)
    if needs.hidden and not needs.deferred:
        products = (saved.grad_hidden[span] * walk.loss.factor[span, None] for span in walk.cuts.chunks)
        walk.write_hidden_gradient(x.to(walk.hidden.dtype) for x in products)
    if needs.weight or needs.bias or needs.deferred:
        walk.run()
    return walk.hidden, walk.weight, walk.bias.to(head.weight.dtype)


class _Loss(NamedTuple):
    """Gradients of the loss in the scored rows, `[N]` float32 each."""

    factor: Tensor  # dL/dlogp
    gain: Tensor  # dL/d logit of the label
    entropy_factor: Tensor | None = None  # of the entropy, as in `native_head.Finished`
    entropy_offset: Tensor | None = None

    @classmethod
    def of_rows(cls, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, options: TokenOptions) -> "_Loss":
        """From the gradients of all positions."""
        factor = grad_logps.flatten()[saved.positions].float()
        if grad_entropy is None:
            return cls(factor, factor * saved.stats[3])
        _, _, scale, label_gain, entropy, label_entropy_gain = saved.stats
        of_entropy = grad_entropy.flatten()[saved.positions].float()
        log2_sum = torch.log2(options.logit_scale / options.temperature / scale)
        return cls(
            factor,
            factor * label_gain + of_entropy * label_entropy_gain,
            -of_entropy * scale * math.log(2),
            entropy / math.log(2) - log2_sum,
        )


class _Backward:
    """Tiles outermost, so that each part of the weight's gradient is finished and rounded once."""

    def __init__(self, head: Head, saved: Saved, labels: Tensor, loss: _Loss, needs: Needs):
        self.head, self.saved, self.loss, self.needs = head, saved, loss, needs
        self.cuts = Cuts.load(saved.schedule)
        self.labels = labels.flatten()[saved.positions]
        self.hidden = torch.zeros_like(head.hidden) if needs.hidden else head.hidden.new_empty(0)
        self.weight = self._weight_memory()
        self.bias = torch.zeros(self.cuts.vocab if needs.bias else 0, dtype=torch.float32, device="cpu")

    def _weight_memory(self) -> Tensor:
        if not self.needs.weight:
            return self.head.weight.new_empty(0)
        if self.needs.inplace:
            return self.saved.grad_weight
        if self.needs.filtered or not self.cuts.rows:  # columns that are not computed have the gradient 0
            return torch.zeros_like(self.head.weight, memory_format=torch.contiguous_format)
        return torch.empty_like(self.head.weight, memory_format=torch.contiguous_format)

    def run(self) -> None:
        """Visit every tile and chunk."""
        recomputes = self.needs.deferred or self.cuts.kept_tiles < len(self.cuts.tiles)
        pairs = self.needs.hidden and self.needs.deferred
        work = Work(self.head, self.cuts, weight=recomputes, pairs=pairs, grad_logits=recomputes)
        chunks = [_BackwardChunk(work, self, number) for number in range(len(self.cuts.chunks))]
        apart = self._memory_apart()
        for tile, columns in enumerate(self.cuts.tiles):
            out = self.weight[columns]
            if self._is_apart(tile):
                out = apart[: len(out)].zero_()
            for chunk in chunks:
                chunk.read(tile, columns, out)
            if self._is_apart(tile):
                self.weight[columns] = out
        if self.needs.bias:
            self.bias.index_add_(0, self.labels, self.loss.gain)
        if self.needs.hidden and self.needs.deferred:
            self.write_hidden_gradient(chunk.hidden_gradient() for chunk in chunks)

    def _is_apart(self, tile: int) -> bool:
        """Whether the weight's gradient of a tile is computed in memory of its own, and copied: as the sum of several
        chunks, in float32, or because it would overwrite P that is being read."""
        return self.needs.weight and (
            len(self.cuts.chunks) > 1 or (self.needs.inplace and self.cuts.shared.overlaps(tile))
        )

    def _memory_apart(self) -> Tensor:
        columns = self.cuts.buffers.columns if any(map(self._is_apart, range(len(self.cuts.tiles)))) else 0
        dtype = torch.float32 if len(self.cuts.chunks) > 1 else self.head.weight.dtype
        return torch.empty(columns, self.cuts.width, dtype=dtype, device="cpu")

    def write_hidden_gradient(self, chunks: Iterable[Tensor]) -> None:
        """Put the chunks' rows `[n, H]` where their positions read the hidden states."""
        index = self.saved.positions - int(self.head.options.shift)
        for span, rows in zip(self.cuts.chunks, chunks):
            self.hidden.index_copy_(0, index[span], rows)


class _BackwardChunk:
    """One chunk of rows: packed hidden states, and the loss's factor in each row."""

    def __init__(self, work: Work, walk: _Backward, number: int):
        self.work, self.walk, self.number = work, walk, number
        self.span = span = walk.cuts.chunks[number]
        self.rows = span.stop - span.start
        self.hidden = gather(work.head, walk.saved.positions[span])
        self.stats, self.factor = walk.saved.stats[:, span], walk.loss.factor[span]
        self.labels, self.columns = walk.labels[span], padded(walk.labels[span].int(), -1)
        self.gain = padded(walk.loss.gain[span], 0)
        self.finished = Finished(
            padded(self.stats[1], 0),
            padded(-self.factor * self.stats[2], 0),
            *(None if x is None else padded(x[span], 0) for x in walk.loss[2:]),
        )
        shapes = walk.cuts.buffers._replace(rows=self.rows)
        self.lanes = work.packed(shapes.lanes if work.grad_logits is not None else (0,))
        self.elements = work.packed(shapes.elements if walk.needs.weight else (0,))
        self.packed_with: Tensor | None = None
        self.gradient = (
            torch.zeros(shapes.gradient, dtype=torch.float32, device="cpu") if work.pairs is not None else None
        )
        native_head.pack_hidden(
            self.hidden,
            self.lanes if work.grad_logits is not None else None,
            self.elements if walk.needs.weight else None,
        )

    def read(self, tile: int, columns: slice, out: Tensor) -> None:
        """Add the rows' contribution in a tile to all gradients."""
        if tile < self.walk.cuts.kept_tiles:
            self._read_kept(tile, columns, out)
            return
        labels = self.columns - columns.start
        for index in self._pieces(columns):
            place = labels if index is None else _places(labels, index)
            made = self.work.tile(columns, index, self.lanes, place, self.rows)
            made = made._replace(gradient=self.gradient, grad_logits=self.work.grad_logits if self._keeps else None)
            native_head.backward(made, self.finished)
            self._add(made, None, columns, index, out)

    @property
    def _keeps(self) -> bool:
        return self.walk.needs.weight or self.walk.needs.bias

    def _read_kept(self, tile: int, columns: slice, out: Tensor) -> None:
        """Saved P includes neither the loss's factor nor the final softmax sum: these multiply the hidden states."""
        moved = self.walk.saved.references[tile, self.span] - self.stats[1]
        factor = padded(-self.factor * self.stats[2] * torch.exp2(moved), 0)
        kept = self.walk.cuts.kept(self.walk.saved.kept, self.walk.saved.grad_weight, tile, self.number)
        count = columns.stop - columns.start
        labels = self.columns - columns.start
        made = Tile(
            self.lanes, self.work.weight, labels, self.rows, count, self.walk.cuts.width, self.work.head.options
        )
        self._add(made._replace(grad_logits=kept), factor, columns, None, out)

    def _add(self, tile: Tile, factor: Tensor | None, columns: slice, index: Tensor | None, out: Tensor) -> None:
        if self.walk.needs.weight:
            self._pack_elements(factor)
            several = len(self.walk.cuts.chunks) > 1
            native_head.weight_gradient(tile, self.elements, LabelGain(self.hidden, self.gain), index, out, several)
        if self.walk.needs.bias:
            ones = torch.ones_like(self.finished.factor) if factor is None else factor
            native_head.add_bias_gradient(tile, ones, index, self.walk.bias[columns])

    def _pack_elements(self, factor: Tensor | None) -> None:
        """Hidden states times a factor per row, packed again only if it has changed."""
        before = self.packed_with
        if (before is None) != (factor is None) or (
            before is not None and factor is not None and not torch.equal(before, factor)
        ):
            native_head.pack_hidden(self.hidden, None, self.elements, factor)
            self.packed_with = factor

    def _pieces(self, columns: slice) -> Iterator[Tensor | None]:
        """Columns of a tile to compute: None for all, or the marked ones, counted from the tile's first."""
        if not self.walk.needs.filtered:
            yield None
            return
        first = self.number * self.walk.cuts.vocab
        marks = self.walk.saved.active[first + columns.start : first + columns.stop]
        active = marks.nonzero().squeeze(1).int()
        if len(active):
            yield active

    def hidden_gradient(self) -> Tensor:
        """`[n, H]`, with the labels' terms, rounded."""
        assert self.gradient is not None
        result = unpacked(self.gradient, self.rows, self.walk.cuts.width)
        for part in spans(self.rows, LABEL_ROWS):
            result[part].addcmul_(self.gain[: self.rows][part, None], self.work.head.weight[self.labels[part]].float())
        return result.to(self.hidden.dtype)


def _places(labels: Tensor, index: Tensor) -> Tensor:
    """Position of each label in a sorted index, -1 if it is not there."""
    place = torch.searchsorted(index, labels, out_int32=True)
    found = index[place.clamp(max=len(index) - 1)] == labels
    return torch.where(found, place, -1)
