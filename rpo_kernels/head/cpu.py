"""The walk on CPUs with bfloat16 units: tiles of logits made, used and forgotten in C++ (`kernels.native_head`).

A tile gives `P = 2^(z - reference)`, z in bits, 0 at each row's label; the reference is an integer that seldom moves.
Exact: forward adds up `P` and `P W` and keeps P of the first tiles; backward makes the others' again. With a filter:
forward adds up P and marks the columns where some row's p may exceed the threshold, backward makes P of the marked
columns alone. The label's own part, `1 - p`, is added to both gradients in float32.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import native, native_head
from ..kernels.interface import TokenOptions
from ..kernels.native_head import Buffers, LabelGain, Running, Tile
from .cpu_plan import LABEL_ROWS
from .plan import MemoryPlan
from .schedule import Forward, Needs, Rows, Saved, spans
from .tiles import Head


class _Cuts(NamedTuple):
    """How rows and columns are cut, and of how many tiles P is kept."""

    rows: int
    vocab: int
    width: int
    chunk_rows: int
    tile_columns: int
    kept_tiles: int

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

    def kept(self, memory: Tensor, tile: int, chunk: int) -> Tensor:
        """P of a chunk and tile in what is kept; tile after tile, each with all its chunks."""
        sizes = [math.prod(Buffers(s.stop - s.start, 1, self.width).unit) for s in self.chunks]
        strips = [Buffers(1, s.stop - s.start, 1).unit[0] for s in self.tiles[: tile + 1]]
        start = sum(strips[:-1]) * sum(sizes) + strips[-1] * sum(sizes[:chunk])
        return memory.view(torch.int32)[start : start + strips[-1] * sizes[chunk]]

    def kept_size(self) -> int:
        """Elements of what is kept, in bfloat16."""
        strips = sum(Buffers(1, s.stop - s.start, 1).unit[0] for s in self.tiles[: self.kept_tiles])
        return 2 * strips * sum(math.prod(Buffers(s.stop - s.start, 1, self.width).unit) for s in self.chunks)


# ---------------------------------------------------------------------------------------------------------- forward


def forward(head: Head, rows: Rows, plan: MemoryPlan, needs: Needs) -> Forward:
    """Log-probabilities of the scored rows `[N]`, what the filter dropped `[N]`, and what backward reads."""
    vocab, width = head.weight.shape
    count, filtered = len(rows.positions), needs.threshold is not None
    cuts = _Cuts(count, vocab, width, plan.chunk_rows, plan.tile_columns, plan.kept_tiles)
    differentiates = needs.hidden and not filtered
    stats = head.hidden.new_zeros(4, count, dtype=torch.float32)
    dropped = stats.new_zeros(count)
    saved = Saved(
        positions=rows.positions,
        stats=stats,
        references=stats.new_empty(cuts.kept_tiles, count),
        unit=stats.new_empty(count if differentiates else 0, width),
        kept=native.empty((cuts.kept_size(),), head.hidden),
        active=head.hidden.new_zeros(len(cuts.chunks) * vocab if filtered else 0, dtype=torch.uint8),
        schedule=torch.tensor([*cuts, filtered], dtype=torch.int64, device="cpu"),
    )
    work = _Work(head, cuts, pairs=differentiates, unit=filtered)
    for number, span in enumerate(cuts.chunks):
        marks = saved.active[number * vocab : (number + 1) * vocab] if filtered else None
        chunk = _ForwardChunk(work, rows.positions[span], rows.labels[span], marks, needs)
        for tile, columns in enumerate(cuts.tiles):
            kept = cuts.kept(saved.kept, tile, number) if tile < cuts.kept_tiles else None
            chunk.read(columns, kept)
            if kept is not None:
                saved.references[tile, span] = chunk.reference[: len(chunk.labels)]
        stats[:, span] = chunk.stats()
        if differentiates:
            chunk.write_unit(stats[:, span], saved.unit[span])
        if marks is not None:
            dropped[span] = chunk.dropped_mass(stats[2, span])
        del chunk
    return Forward(stats[0].clone(), dropped, saved, stats.new_empty(0, count))


class _Work:
    """Memory for the packed operands of one tile."""

    def __init__(self, head: Head, cuts: _Cuts, *, weight: bool = True, pairs: bool, unit: bool):
        self.head, self.cuts = head, cuts
        shapes = cuts.buffers
        self.weight_rows = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.weight = self.packed(shapes.weight if weight else (0,))
        self.pairs = self.packed(shapes.pairs) if pairs else None
        self.unit = self.packed(shapes.unit) if unit else None
        self.bias = None if head.bias is None else head.bias.float()

    def packed(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised packed operands."""
        return self.head.hidden.new_empty(shape, dtype=torch.int32)

    def tile(self, columns: slice, index: Tensor | None, lanes: Tensor, labels: Tensor, rows: int) -> Tile:
        """Load columns of the weight, or those that an index counts from the first of them."""
        weight = self.weight_rows[columns]
        native_head.pack_weight(weight, index, self.weight, self.pairs)
        bias = None if self.bias is None else self.bias[columns]
        if bias is not None and index is not None:
            bias = bias[index]
        count = len(weight) if index is None else len(index)
        return Tile(lanes, self.weight, labels, rows, count, self.cuts.width, self.head.options, bias, self.pairs)


class _ForwardChunk:
    """One chunk of rows on its walk over the vocabulary. Tensors of numbers a row are padded to whole panels."""

    def __init__(self, work: _Work, positions: Tensor, labels: Tensor, marks: Tensor | None, needs: Needs):
        self.work, self.labels, self.marks = work, labels, marks
        self.options, self.rows = work.head.options, len(labels)
        hidden = _gather(work.head, positions)
        self.logits = _label_logits(hidden, work.head, labels)
        self.shapes = work.cuts.buffers._replace(rows=self.rows)
        self.lanes = work.packed(self.shapes.lanes)
        native_head.pack_hidden(hidden, self.lanes, None)
        self.bits, self.slope = _transform(self.logits, self.options)
        self.label = _padded(self.bits.float(), math.inf)  # so that no padding marks a column
        self.columns = _padded(labels.int(), -1)
        self.reference = _padded(self.bits.float().ceil().clamp(min=-1e30), 0)
        self.sum = torch.zeros(len(self.reference), dtype=torch.float64, device="cpu")
        self.gradient = (
            torch.zeros(self.shapes.gradient, dtype=torch.float32, device="cpu") if work.pairs is not None else None
        )
        self.dropped = torch.zeros_like(self.sum)
        self.threshold = (needs.threshold or 0.0) * self.options.temperature / self.options.logit_scale
        if marks is not None:
            marks.index_fill_(0, labels, 1)

    def read(self, columns: slice, kept: Tensor | None) -> None:
        """Continue the softmax, and the hidden states' gradient, with a tile."""
        tile = self.work.tile(columns, None, self.lanes, self.columns - columns.start, self.rows)
        unit = self.work.unit if kept is None else kept
        tile = tile._replace(gradient=self.gradient, unit=unit, stream=kept is not None)
        running = Running(self.reference, self.sum, self.label)
        if self.marks is not None:
            running = running._replace(marks=self.marks[columns], dropped=self.dropped, threshold=self.threshold)
        native_head.forward(tile, running)

    def stats(self) -> Tensor:
        """Of the finished rows: logp, reference, scale, label gain. `p = scale * P`, without a transform's slope."""
        others, reference = self.sum[: self.rows], self.reference[: self.rows].double()
        logp = -torch.log1p(others * torch.exp2(reference - self.bits))
        # Where the label has no weight at all, 1 + infinity is no help.
        logp = torch.where(self.bits == -math.inf, -math.inf * (others > 0).double(), logp)
        scale = (self.options.logit_scale / self.options.temperature) / (others + torch.exp2(self.bits - reference))
        return torch.stack((logp, reference, scale, -torch.expm1(logp) * self.slope)).float()

    def write_unit(self, stats: Tensor, out: Tensor) -> None:
        """`dlogp/dhidden = gain W[label] - scale sum of P W`."""
        assert self.gradient is not None
        torch.mul(_unpacked(self.gradient, self.rows, out.shape[1]), -stats[2, :, None], out=out)
        for part in spans(self.rows, LABEL_ROWS):
            out[part].addcmul_(stats[3, part, None], self.work.head.weight[self.labels[part]].float())

    def dropped_mass(self, scale: Tensor) -> Tensor:
        """A bound of the sum of |dlogp / dlogit| over the columns without a mark."""
        rounding = 1 + 2.0**-8  # of P to bfloat16
        return (self.dropped[: self.rows] * scale * rounding).float()


def _gather(head: Head, positions: Tensor) -> Tensor:
    """Hidden states that predict the labels at these positions, `[n, H]`."""
    return head.hidden.index_select(0, positions - int(head.options.shift))


def _label_logits(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The labels' logits before their transform, `[n]` float64."""
    logits = hidden.new_empty(len(labels), dtype=torch.float64)
    for part in spans(len(labels), LABEL_ROWS):
        product = hidden[part].float() * head.weight[labels[part]].float()  # exact
        torch.sum(product, -1, dtype=torch.float64, out=logits[part])
    return logits if head.bias is None else logits + head.bias[labels]


def _transform(logits: Tensor, options: TokenOptions) -> tuple[Tensor, Tensor]:
    """Transformed logits in bits, with the constants that the kernel rounds to float32, and `dz/dx`."""
    slope = options.logit_scale / options.temperature
    if options.softcap is None:
        return logits * _float32(slope * math.log2(math.e)), torch.full_like(logits, slope)
    u = logits * _float32(options.logit_scale / options.softcap)
    bits = u.tanh() * _float32(options.softcap / options.temperature * math.log2(math.e))
    return bits, slope / u.cosh().square()


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32, device="cpu").item()


def _padded(x: Tensor, fill: float) -> Tensor:
    """Continued to whole panels."""
    result = x.new_full((native_head.panels(len(x)) * native_head.PANEL,), fill)
    result[: len(x)] = x
    return result


def _unpacked(gradient: Tensor, rows: int, width: int) -> Tensor:
    """`[n, H]` from the packed gradient of the hidden states."""
    panels, parts, strip, panel = gradient.shape
    return gradient.permute(0, 3, 1, 2).reshape(panels * panel, parts * strip)[:rows, :width]


# --------------------------------------------------------------------------------------------------------- backward


def backward(
    head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor, grad_entropy: None, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states `[M, H]`, weight `[V, H]` and bias `[V]`; empty where not needed."""
    walk = _Backward(head, saved, labels, grad_logps, needs)
    if needs.hidden and not walk.filtered:
        products = (saved.unit[span] * walk.factor[span, None] for span in walk.cuts.chunks)
        walk.write_hidden_gradient(x.to(walk.hidden.dtype) for x in products)
    if needs.weight or needs.bias or walk.filtered:
        walk.run()
    return walk.hidden, walk.weight, walk.bias.to(head.weight.dtype)


class _Backward:
    """Tiles outermost, so that each part of the weight's gradient is finished and rounded once."""

    def __init__(self, head: Head, saved: Saved, labels: Tensor, grad_logps: Tensor, needs: Needs):
        *cuts, filtered = saved.schedule.tolist()
        self.head, self.saved, self.needs = head, saved, needs
        self.cuts, self.filtered = _Cuts(*cuts), bool(filtered)
        self.labels = labels.flatten()[saved.positions]
        self.factor = grad_logps.flatten()[saved.positions].float()
        self.hidden = torch.zeros_like(head.hidden) if needs.hidden else head.hidden.new_empty(0)
        self.weight = self._weight_memory()
        self.bias = torch.zeros(self.cuts.vocab if needs.bias else 0, dtype=torch.float32, device="cpu")

    def _weight_memory(self) -> Tensor:
        if not self.needs.weight:
            return self.head.weight.new_empty(0)
        if self.filtered or not self.cuts.rows:  # what is not visited is 0
            return torch.zeros_like(self.head.weight, memory_format=torch.contiguous_format)
        return torch.empty_like(self.head.weight, memory_format=torch.contiguous_format)

    def run(self) -> None:
        """Visit every tile and chunk."""
        recomputes = self.filtered or self.cuts.kept_tiles < len(self.cuts.tiles)
        pairs = self.needs.hidden and self.filtered
        work = _Work(self.head, self.cuts, weight=recomputes, pairs=pairs, unit=recomputes)
        chunks = [_BackwardChunk(work, self, number) for number in range(len(self.cuts.chunks))]
        # A chunk alone writes the gradient's rows itself; several are summed in float32.
        size = self.cuts.buffers.columns * self.cuts.width if self.needs.weight and len(chunks) > 1 else 0
        memory = torch.empty(size, dtype=torch.float32, device="cpu")
        for tile, columns in enumerate(self.cuts.tiles):
            out = self.weight[columns]
            if size:
                out = memory[: out.numel()].view(out.shape).zero_()
            for chunk in chunks:
                chunk.read(tile, columns, out)
            if size:
                self.weight[columns] = out
        if self.needs.bias:
            self.bias.index_add_(0, self.labels, self.factor * self.saved.stats[3])
        if self.needs.hidden and self.filtered:
            self.write_hidden_gradient(chunk.hidden_gradient() for chunk in chunks)

    def write_hidden_gradient(self, chunks: Iterable[Tensor]) -> None:
        """Put the chunks' rows `[n, H]` where their positions read the hidden states."""
        index = self.saved.positions - int(self.head.options.shift)
        for span, rows in zip(self.cuts.chunks, chunks):
            self.hidden.index_copy_(0, index[span], rows)


class _BackwardChunk:
    """One chunk of rows: packed hidden states, and the loss's factor in each row."""

    def __init__(self, work: _Work, walk: _Backward, number: int):
        self.work, self.walk, self.number = work, walk, number
        self.span = span = walk.cuts.chunks[number]
        self.rows = span.stop - span.start
        self.hidden = _gather(work.head, walk.saved.positions[span])
        self.stats, self.factor = walk.saved.stats[:, span], walk.factor[span]
        self.labels, self.columns = walk.labels[span], _padded(walk.labels[span].int(), -1)
        self.gain = _padded(self.factor * self.stats[3], 0)
        self.reference = _padded(self.stats[1], 0)
        self.scale = _padded(-self.factor * self.stats[2], 0)
        shapes = walk.cuts.buffers._replace(rows=self.rows)
        self.lanes = work.packed(shapes.lanes if work.unit is not None else (0,))
        self.elements = work.packed(shapes.elements if walk.needs.weight else (0,))
        self.packed_with: Tensor | None = None
        self.gradient = (
            torch.zeros(shapes.gradient, dtype=torch.float32, device="cpu") if work.pairs is not None else None
        )
        native_head.pack_hidden(
            self.hidden,
            self.lanes if work.unit is not None else None,
            self.elements if walk.needs.weight else None,
        )

    def read(self, tile: int, columns: slice, out: Tensor) -> None:
        """Add the rows' part of a tile to all gradients."""
        if tile < self.walk.cuts.kept_tiles:
            self._read_kept(tile, columns, out)
            return
        labels = self.columns - columns.start
        for index in self._pieces(columns):
            place = labels if index is None else _places(labels, index)
            made = self.work.tile(columns, index, self.lanes, place, self.rows)
            made = made._replace(gradient=self.gradient, unit=self.work.unit if self._keeps else None)
            native_head.backward(made, self.reference, self.scale)
            self._add(made, None, columns, index, out)

    @property
    def _keeps(self) -> bool:
        return self.walk.needs.weight or self.walk.needs.bias

    def _read_kept(self, tile: int, columns: slice, out: Tensor) -> None:
        """P as it was kept knows neither the loss's factor nor the finished softmax: they go on the hidden states."""
        moved = self.walk.saved.references[tile, self.span] - self.stats[1]
        factor = _padded(-self.factor * self.stats[2] * torch.exp2(moved), 0)
        kept = self.walk.cuts.kept(self.walk.saved.kept, tile, self.number)
        count = columns.stop - columns.start
        labels = self.columns - columns.start
        made = Tile(
            self.lanes, self.work.weight, labels, self.rows, count, self.walk.cuts.width, self.work.head.options
        )
        self._add(made._replace(unit=kept), factor, columns, None, out)

    def _add(self, tile: Tile, factor: Tensor | None, columns: slice, index: Tensor | None, out: Tensor) -> None:
        if self.walk.needs.weight:
            self._pack_elements(factor)
            several = len(self.walk.cuts.chunks) > 1
            native_head.weight_gradient(tile, self.elements, LabelGain(self.hidden, self.gain), index, out, several)
        if self.walk.needs.bias:
            ones = torch.ones_like(self.scale) if factor is None else factor
            native_head.add_bias_gradient(tile, ones, index, self.walk.bias[columns])

    def _pack_elements(self, factor: Tensor | None) -> None:
        """Hidden states times a factor a row, packed again only where it differs from the one before."""
        before = self.packed_with
        if (before is None) != (factor is None) or (
            before is not None and factor is not None and not torch.equal(before, factor)
        ):
            native_head.pack_hidden(self.hidden, None, self.elements, factor)
            self.packed_with = factor

    def _pieces(self, columns: slice) -> Iterator[Tensor | None]:
        """Columns of a tile to visit: None for all, or those with a mark, counted from the tile's first."""
        if not self.walk.filtered:
            yield None
            return
        first = self.number * self.walk.cuts.vocab
        marks = self.walk.saved.active[first + columns.start : first + columns.stop]
        active = marks.nonzero().squeeze(1).int()
        if len(active):
            yield active

    def hidden_gradient(self) -> Tensor:
        """`[n, H]`, with the labels' part, rounded."""
        assert self.gradient is not None
        result = _unpacked(self.gradient, self.rows, self.walk.cuts.width)
        for part in spans(self.rows, LABEL_ROWS):
            result[part].addcmul_(self.gain[: self.rows][part, None], self.work.head.weight[self.labels[part]].float())
        return result.to(self.hidden.dtype)


def _places(labels: Tensor, index: Tensor) -> Tensor:
    """Where each label stands in a sorted index, -1 if nowhere."""
    place = torch.searchsorted(index, labels, out_int32=True)
    found = index[place.clamp(max=len(index) - 1)] == labels
    return torch.where(found, place, -1)
