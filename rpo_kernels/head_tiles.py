"""Head level, the work itself: forward and backward over tiles of logits `[chunk of rows, tile of columns]`.

The vocabulary is walked once with a running softmax (arXiv 1805.02867, 2205.14135). With `U = onehot(y) - softmax(z)`
relative to the columns seen so far, a tile gives its share of `U W` at once, and the sum is rescaled as the softmax
grows; so logits exist one tile at a time. What is kept for the weight's gradient is the tile's U. The scale `s` by
which it shrinks until the softmax is complete goes on the `[rows, H]` side, like the loss's factor c:

    dL/dhidden = c (sum over tiles of s U W)        dL/dW[tile] = (s U)^T (c hidden)

At the label's column `s (1 - p so far) = s - p` lacks `1 - s`: the label's gain, added to both without cancellation.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import products
from .kernels import dispatch
from .kernels.contract import ActiveColumns, RowStats, TokenOptions
from .plan import DENSE_SHARE, EDGE, MemoryPlan, operand_dtype


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
        mixed = products.results_in_float32(self.weight.device.type, self.operand_dtype)
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


class Rows(NamedTuple):
    """The scored rows in the order of their labels, so that those whose label lies in one tile are neighbours."""

    positions: Tensor  # [N] int64: places in the flattened labels
    labels: Tensor  # [N] int64
    bounds: list[int]  # for each multiple of EDGE, then V: how many rows have a smaller label


def find_rows(labels: Tensor, vocab: int, options: TokenOptions) -> Rows:
    """Scored rows of labels `[B, T]`. The one place where the host waits for the device."""
    scored = labels != options.ignore_index
    if options.shift:
        scored = scored & (torch.arange(labels.shape[-1], device=labels.device) > 0)
    unscored = torch.iinfo(torch.int64).max
    ordered, order = torch.where(scored, labels.long(), unscored).flatten().sort(stable=True)
    edges = torch.tensor([*range(0, vocab, EDGE), vocab, unscored], device=labels.device)
    *bounds, count = torch.searchsorted(ordered, edges).tolist()
    return Rows(order[:count].clone(), ordered[:count].clone(), bounds)


class Place(NamedTuple):
    """Where the U of one chunk and tile is kept."""

    offset: int = -1  # first element in `Saved.kept`; -1: not kept, backward recomputes it
    columns_offset: int = 0  # first of its active columns in `Saved.columns`
    columns: int = -1  # how many; -1: all columns of the tile


class Schedule:
    """How rows and columns are cut, and what is kept where; on the host."""

    def __init__(self, rows: int, vocab: int, chunk: int, tile: int, bounds: list[int]):
        self.sizes = (rows, vocab, chunk, tile)
        self.chunks = _spans(rows, chunk)
        self.tiles = _spans(vocab, tile)
        self.bounds = bounds  # for each tile, then the end: how many rows have a smaller label
        self.places = [[Place()] * len(self.tiles) for _ in self.chunks]

    def label_rows(self, rows: slice, tile: int) -> slice:
        """Those of some rows whose label lies in a tile."""
        start = min(max(rows.start, self.bounds[tile]), rows.stop)
        return slice(start, max(start, min(rows.stop, self.bounds[tile + 1])))

    def dump(self) -> Tensor:
        """As one tensor, for an operator to return."""
        places = [number for chunk in self.places for place in chunk for number in place]
        return torch.tensor([*self.sizes, *self.bounds, *places], dtype=torch.int64)

    @classmethod
    def load(cls, packed: Tensor) -> "Schedule":
        """Back from `dump`."""
        rows, vocab, chunk, tile, *numbers = packed.tolist()
        edges = len(_spans(vocab, tile)) + 1
        schedule = cls(rows, vocab, chunk, tile, numbers[:edges])
        places = iter(Place(*numbers[i : i + 3]) for i in range(edges, len(numbers), 3))
        schedule.places = [[next(places) for _ in schedule.tiles] for _ in schedule.chunks]
        return schedule


class Saved(NamedTuple):
    """What forward leaves for backward: the operator's outputs after its results."""

    positions: Tensor  # [N]
    stats: Tensor  # [4, N]: logp, max, sumexp, label gain
    log_scale: Tensor  # [tiles, N]: log s of the tiles of which something may be kept
    unit: Tensor  # [N, H]: dlogp/dhidden, not rounded; or [0, H]
    kept: Tensor  # flat: U
    columns: Tensor  # flat int32: active columns, counted from the tile's first
    schedule: Tensor  # flat int64, on the CPU


class _Scratch:
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
        products.multiply(hidden, weight.T, logits)
        return logits if self.head.bias is None else logits.add_(self.head.bias[columns])

    def tile(self, rows: int, columns: int) -> Tensor:
        """Uninitialised memory of the tile of logits."""
        return self.logits[: rows * columns].view(rows, columns)


class _Store:
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


# ---------------------------------------------------------------------------------------------------------- forward


def forward(
    head: Head, rows: Rows, plan: MemoryPlan, needs_hidden: bool, threshold: float | None
) -> tuple[Tensor, Tensor, Saved]:
    """Log-probabilities of the scored rows `[N]`, the gradient mass that the filter dropped `[N]`, and what to save."""
    count, (vocab, width) = len(rows.positions), head.weight.shape
    bounds = [rows.bounds[min(i * plan.tile_columns // EDGE, len(rows.bounds) - 1)] for i in range(plan.tiles + 1)]
    schedule = Schedule(count, vocab, plan.chunk_rows, plan.tile_columns, bounds)
    scratch = _Scratch(head, schedule)
    store = _Store(head, schedule, plan, threshold is not None)

    stats = head.hidden.new_zeros(4, count, dtype=head.exact_dtype)
    log_scale = head.hidden.new_empty(store.tiles, count, dtype=head.exact_dtype)
    dropped = head.hidden.new_zeros(count, dtype=head.exact_dtype)
    unit = head.hidden.new_empty(count if needs_hidden else 0, width, dtype=head.exact_dtype)
    for number, span in enumerate(schedule.chunks):
        chunk = _Chunk(head, schedule, number, rows, needs_hidden, threshold)
        for tile, columns in enumerate(schedule.tiles):
            weight = scratch.load(columns)
            logits = scratch.multiply(chunk.hidden, weight, columns)
            chunk.read(tile, logits)
            if needs_hidden or tile < store.tiles:
                chunk.differentiate(tile, logits, weight, store)
        stats[:3, span] = chunk.stats()
        if needs_hidden or store.tiles:
            stats[3, span] = chunk.add_label_gain(log_scale[:, span])
        if chunk.dropped is not None:
            dropped[span] = chunk.dropped
        if chunk.gradient is not None:
            unit[span] = chunk.gradient
        del chunk
    kept, active = store.filled()
    return stats[0].clone(), dropped, Saved(rows.positions, stats, log_scale, unit, kept, active, schedule.dump())


class _Chunk:
    """One chunk of rows on its walk over the vocabulary."""

    def __init__(
        self, head: Head, schedule: Schedule, number: int, rows: Rows, needs_hidden: bool, threshold: float | None
    ):
        self.head, self.schedule, self.number, self.threshold = head, schedule, number, threshold
        self.span = schedule.chunks[number]
        self.hidden = head.gather(rows.positions[self.span])
        self.labels = rows.labels[self.span]
        self.running: RowStats | None = None
        # The running maximum and sum of exponentials after each tile.
        self.history = self.hidden.new_empty(2, len(schedule.tiles), len(self.labels), dtype=head.exact_dtype)
        # Sums over the tiles so far: of U W, and of |U| over dropped columns.
        self.gradient = self.hidden.new_zeros(self.hidden.shape, dtype=head.exact_dtype) if needs_hidden else None
        self.dropped = None if threshold is None else self.history.new_zeros(len(self.labels))

    def read(self, tile: int, logits: Tensor) -> None:
        """Continue the softmax with a tile of logits."""
        first = self.schedule.tiles[tile].start
        self.running = self.head.row_stats(logits, self.labels, first, self.running)
        self.history[0, tile] = self.running.max[0]
        self.history[1, tile] = self.running.sumexp[0]

    def differentiate(self, tile: int, logits: Tensor, weight: Tensor, store: _Store) -> None:
        """Turn a tile of logits into U, add its share to the sums, and keep it if there is room."""
        assert self.running is not None
        self._shrink_sums(tile)
        stats = self.running if self.head.bias is None else _defined(self.running)
        if self.threshold is None:
            unit = self._unit(tile, logits, stats, store)
        else:
            unit, weight = self._filtered_unit(tile, logits, stats, weight, store, self.threshold)
        if self.gradient is not None:
            products.add_product(self.gradient, unit, weight)

    def stats(self) -> Tensor:
        """The rows' finished log-probability, maximum and sum of exponentials, `[3, n]`."""
        assert self.running is not None
        return torch.cat((self.running.logp, self.running.max, self.running.sumexp))

    def add_label_gain(self, log_scale: Tensor) -> Tensor:
        """Add the label's gain to the gradient and write log s of the first tiles; returns the gain `[n]`."""
        assert self.running is not None
        all_scales = _log_scale(self.history, self.history[:, -1:])
        log_scale.copy_(all_scales[: len(log_scale)])
        column = self.labels.clamp(0, len(self.head.weight) - 1)
        label_scale = all_scales.gather(0, (column // self.schedule.sizes[3])[None])[0]
        gain = -torch.expm1(label_scale) * _slope(self.running.label_logit[0], self.head.options)
        gain = torch.where(column == self.labels, gain, 0)  # a label out of range has no column
        if self.gradient is not None:
            rows = self.head.weight.index_select(0, column).to(self.gradient.dtype)
            self.gradient.addcmul_(gain[:, None], rows)
        return gain

    def _shrink_sums(self, tile: int) -> None:
        """Bring the sums from the softmax after the tile before to that after this one."""
        if tile == 0:
            return
        scale = _log_scale(self.history[:, tile - 1], self.history[:, tile]).exp_()
        if self.gradient is not None:
            self.gradient.mul_(scale[:, None])
        if self.dropped is not None:
            self.dropped.mul_(scale)

    def _unit(self, tile: int, logits: Tensor, stats: RowStats, store: _Store) -> Tensor:
        """U as GEMMs read it, kept if there is room."""
        first = self.schedule.tiles[tile].start
        kept = store.place(self.number, tile)
        if kept is not None and kept.dtype == self.head.operand_dtype:
            return self.head.row_grad(logits, self.labels, stats, first, kept)
        unit = self.head.row_grad(logits, self.labels, stats, first, self.head.operand_like(logits))
        if kept is not None:
            kept.copy_(unit)
        return unit

    def _filtered_unit(
        self, tile: int, logits: Tensor, stats: RowStats, weight: Tensor, store: _Store, threshold: float
    ) -> tuple[Tensor, Tensor]:
        """U of the columns that count, and their rows of the weight."""
        first = self.schedule.tiles[tile].start
        active = ActiveColumns(torch.zeros(logits.shape[1], dtype=torch.uint8, device=logits.device), threshold)
        unit = self.head.row_grad(logits, self.labels, stats, first, self.head.operand_like(logits), active)
        own = self.schedule.label_rows(self.span, tile)
        own_columns = self.labels[own.start - self.span.start : own.stop - self.span.start] - first
        columns = active.mask.index_fill_(0, own_columns, 1).nonzero().squeeze(1)
        if len(columns) > DENSE_SHARE * logits.shape[1]:
            kept = store.place(self.number, tile)
        else:
            kept = store.place(self.number, tile, columns)
            self._add_dropped(unit, active.mask == 0)
            unit, weight = unit.index_select(1, columns), weight.index_select(0, columns)
        if kept is not None:
            kept.copy_(unit)
        return unit, weight

    def _add_dropped(self, unit: Tensor, out: Tensor) -> None:
        """Add the mass of the columns left out: the sum of U, which off the labels is negative."""
        assert self.dropped is not None
        mass = torch.empty_like(self.dropped)[:, None]
        products.multiply(unit, out[:, None].to(unit.dtype), mass)
        self.dropped -= mass[:, 0]


# --------------------------------------------------------------------------------------------------------- backward


def backward_hidden(head: Head, saved: Saved, grad_logps: Tensor) -> Tensor:
    """Gradient of the hidden states `[M, H]`."""
    gradient = torch.zeros_like(head.hidden)
    index, factor = saved.positions - int(head.options.shift), grad_logps.flatten()[saved.positions]
    for span in Schedule.load(saved.schedule).chunks:
        gradient.index_copy_(0, index[span], (saved.unit[span] * factor[span, None]).to(gradient.dtype))
    return gradient


def backward_weight(
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
        self.scratch = _Scratch(head, self.schedule)
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
        return unit, self.saved.columns[place.columns_offset : place.columns_offset + place.columns]

    def factors(self, tile: int, rows: slice, place: Place) -> tuple[Tensor, slice, Tensor]:
        """The loss's factor and s of these rows; those whose label lies in the tile, and the loss's factor and gain
        of those. What is computed again needs neither s nor a gain."""
        if place.offset < 0:
            return self.factor[rows], slice(0, 0), self.factor[:0]
        own = self.schedule.label_rows(rows, tile)
        scale = self.saved.log_scale[tile, rows].exp().mul_(self.factor[rows])
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
            products.multiply(left, right, product)
            self._filled().index_add_(0, rows, product)
        elif self.empty:
            products.multiply(left, right, self.exact)
        else:
            products.add_product(self.exact, left, right)
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


# ------------------------------------------------------------------------------------------------------- arithmetic


def _spans(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _log_scale(before: Tensor, after: Tensor) -> Tensor:
    """log of sum-exp before over sum-exp after, from `[2, ...]` maxima and sums; -inf where nothing came before."""
    scale = (before[0] - after[0]).add_((before[1] / after[1]).log_())
    return scale.masked_fill_(before[0] == -torch.inf, -torch.inf)


def _defined(stats: RowStats) -> RowStats:
    """Statistics that give U = 0 off the label where every logit so far is -inf (a bias that masks columns)."""
    nothing = stats.max == -torch.inf
    return stats._replace(
        logp=torch.where(nothing, -torch.inf, stats.logp), sumexp=torch.where(nothing, 1, stats.sumexp)
    )


def _slope(label_logit: Tensor, options: TokenOptions) -> Tensor | float:
    """`dz/dx` at a transformed logit z."""
    slope = options.logit_scale / options.temperature
    if options.softcap is None:
        return slope
    return slope * (1 - (label_logit * options.temperature / options.softcap) ** 2).clamp(min=0)
