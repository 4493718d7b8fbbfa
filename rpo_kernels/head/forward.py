"""Forward walk over tiles of logits `[chunk of rows, tile of columns]`.

The vocabulary is walked once with a running softmax (arXiv 1805.02867, 2205.14135). With `U = onehot(y) - softmax(z)`
relative to the columns seen so far, a tile gives its share of `U W` at once, and the sum is rescaled as the softmax
grows; so logits exist one tile at a time. What is kept for the weight's gradient is the tile's U. The scale `s` by
which it shrinks until the softmax is complete goes on the `[rows, H]` side, like the loss's factor c:

    dL/dhidden = c (sum over tiles of s U W)        dL/dW[tile] = (s U)^T (c hidden)

At the label's column `s (1 - p so far) = s - p` lacks `1 - s`: the label's gain, added to both without cancellation.
"""

import torch
from torch import Tensor

from ..kernels.interface import ActiveColumns, RowStats, TokenOptions
from . import gemm
from .plan import DENSE_SHARE, EDGE, MemoryPlan
from .schedule import Forward, Needs, Rows, Saved, Schedule
from .tiles import Head, KeptTiles, Scratch


def forward(head: Head, rows: Rows, plan: MemoryPlan, needs: Needs) -> Forward:
    """Log-probabilities of the scored rows, the gradient mass that the filter dropped, and what to save."""
    needs_hidden, threshold = needs.hidden, needs.threshold
    count, (vocab, width) = len(rows.positions), head.weight.shape
    bounds = [rows.bounds[min(i * plan.tile_columns // EDGE, len(rows.bounds) - 1)] for i in range(plan.tiles + 1)]
    schedule = Schedule(count, vocab, plan.chunk_rows, plan.tile_columns, bounds)
    scratch = Scratch(head, schedule)
    store = KeptTiles(head, schedule, plan, threshold is not None)

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
    saved = Saved(rows.positions, stats, log_scale, unit, kept, active.view(torch.uint8), schedule.dump())
    return Forward(stats[0].clone(), dropped, saved)


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

    def differentiate(self, tile: int, logits: Tensor, weight: Tensor, store: KeptTiles) -> None:
        """Turn a tile of logits into U, add its share to the sums, and keep it if there is room."""
        assert self.running is not None
        self._shrink_sums(tile)
        stats = self.running if self.head.bias is None else _defined(self.running)
        if self.threshold is None:
            unit = self._unit(tile, logits, stats, store)
        else:
            unit, weight = self._filtered_unit(tile, logits, stats, weight, store, self.threshold)
        if self.gradient is not None:
            gemm.add_matmul(self.gradient, unit, weight)

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

    def _unit(self, tile: int, logits: Tensor, stats: RowStats, store: KeptTiles) -> Tensor:
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
        self, tile: int, logits: Tensor, stats: RowStats, weight: Tensor, store: KeptTiles, threshold: float
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
        gemm.matmul(unit, out[:, None].to(unit.dtype), mass)
        self.dropped -= mass[:, 0]


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
