"""Forward over tiles of logits `[chunk of rows, tile of columns]`; derived in docs/head.md.

The tiles of a chunk of rows are computed in turn with an online softmax (arXiv 1805.02867, 2205.14135). A tile's
P = exp(z - r), relative to a reference r of its row and without the label's column, is multiplied by W at once, so that
one tile of logits is materialised at a time; the label's term, `(1 - p) W[label]`, is added at the end of a chunk,
without cancellation. P of some tiles is saved for the weight's gradient. With a filter P is not saved: forward marks
the columns that backward recomputes.
"""

import torch
from torch import Tensor

from ..kernels.interface import ActiveColumns, RowStats
from ..kernels.kept import KeptTiles
from ..kernels.softmax import write_logp
from . import gemm
from .plan import MemoryPlan
from .schedule import Forward, Needs, Rows, Saved, Schedule
from .tiles import Head, Scratch


def forward(head: Head, rows: Rows, plan: MemoryPlan, needs: Needs) -> Forward:
    """Results of the scored rows, the gradient mass that the filter leaves out, and the tensors to save."""
    count, (vocab, width) = len(rows.positions), head.weight.shape
    schedule = Schedule(count, vocab, plan.chunk_rows, plan.tile_columns, plan.kept_tiles, plan.shared)
    layout = (count, vocab, plan.tile_columns, plan.kept_tiles)
    memory = head.hidden.new_empty(KeptTiles.size(*layout, plan.shared.tiles))
    grad_weight = head.hidden.new_empty(vocab if plan.shared.tiles else 0, width)
    kept = KeptTiles(memory, grad_weight, plan.shared, *layout, slice(0, count))
    kept.clear_padding()
    exact = head.exact_dtype
    stats = head.hidden.new_zeros(4 + needs.entropy, count, dtype=exact)
    outputs = head.hidden.new_zeros(len(needs.outputs), count, dtype=exact)
    scales = head.hidden.new_empty(plan.kept_tiles, count, dtype=exact)
    grad_hidden = head.hidden.new_empty(count if needs.hidden and not needs.deferred else 0, width, dtype=exact)
    active = head.label_mask(rows, schedule if needs.filtered else None)
    dropped = head.hidden.new_zeros(count, dtype=exact)

    scratch = Scratch(head, schedule)
    for number, span in enumerate(schedule.chunks):
        chunk = _Chunk(head, schedule, scratch, rows, span, stats, needs.outputs)
        if needs.filtered and needs.threshold is not None:
            chunk.mark(active[number], needs.threshold, dropped[span])
        elif len(grad_hidden):
            chunk.differentiate(kept, scales, grad_hidden[span])
        else:
            chunk.differentiate(kept, scales, None)
        for output, name in zip(outputs[:, span], needs.outputs):
            output.copy_(chunk.output(name))
    if needs.entropy:
        stats[4] = outputs[needs.outputs.index("entropy")]
    saved = Saved(
        positions=rows.positions,
        stats=stats,
        references=scales,
        grad_hidden=grad_hidden,
        kept=kept.memory,
        grad_weight=grad_weight,
        active=active.flatten(),
        schedule=schedule.dump(),
    )
    return Forward(stats[0].clone(), dropped, saved, outputs)


class _Chunk:
    """The running softmax and gradient of one chunk of rows."""

    def __init__(
        self,
        head: Head,
        schedule: Schedule,
        scratch: Scratch,
        rows: Rows,
        span: slice,
        stats: Tensor,
        outputs: tuple[str, ...],
    ):
        self.head, self.schedule, self.scratch, self.span, self.outputs = head, schedule, scratch, span, outputs
        self.hidden = head.gather(rows.positions[span])
        self.labels = rows.labels[span]
        # The softmax before the first column.
        self.stats = RowStats(*stats[:4, None, span])
        self.output_stats: RowStats | None = None  # of the outputs, by a second pass over each tile
        self.stats.max.fill_(-torch.inf)
        self.stats.label_logit.fill_(-torch.inf)

    def differentiate(self, kept: KeptTiles, scales: Tensor, sums: Tensor | None) -> None:
        """Compute all tiles: save P of the first ones, sum P W into `sums` if given; else only statistics."""
        head, options = self.head, self.head.row_options
        kept = kept.of_rows(self.span)
        references = self.hidden.new_empty(len(self.labels), dtype=head.exact_dtype)
        for tile, columns in enumerate(self.schedule.tiles):
            weight = self.scratch.load(columns)
            logits = self.scratch.logits(self.hidden, weight, columns)
            self._update_output_stats(logits, columns.start)
            keeps = tile < kept.tiles
            if not keeps and sums is None:
                if self.output_stats is None:
                    head.kernels.row_stats(logits[None], self.labels[None], options, columns.start, self.stats)
                continue
            in_kept = keeps and kept.memory.dtype == head.operand_dtype
            out = kept.tile(tile) if in_kept else self.scratch.grad_logits(*logits.shape)
            to = scales[tile, self.span] if keeps else references
            moved = sums if tile else None
            head.softmax.weigh(logits, self.labels, self.stats, columns.start, options, to, out, moved)
            if keeps and not in_kept:
                kept.tile(tile).copy_(out)
            if sums is not None and tile == 0:
                gemm.matmul(out, weight, sums)
            elif sums is not None:
                gemm.add_matmul(sums, out, weight)
        if self.output_stats is not None and not kept.tiles and sums is None:
            for state, value in zip(self.stats[:4], self.output_stats[:4]):
                state.copy_(value)
        if kept.tiles or sums is not None:
            of_rows = scales[:, self.span]
            head.softmax.finish(self.stats, self.labels, options, of_rows, sums, head.weight, kept)

    def mark(self, active: Tensor, threshold: float, dropped: Tensor) -> None:
        """Compute all tiles and mark the columns in which some row's gradient may exceed the threshold."""
        head, options = self.head, self.head.row_options
        label_logits = head.label_logits(self.hidden, self.labels)
        self.stats.max[0] = label_logits
        for columns in self.schedule.tiles:
            logits = self.scratch.logits(self.hidden, self.scratch.load(columns), columns)
            self._update_output_stats(logits, columns.start)
            mask = ActiveColumns(active[columns], threshold)
            arguments = (self.labels, self.stats, columns.start, options, label_logits, mask, dropped)
            head.softmax.mark(logits, *arguments)
        write_logp(self.stats)
        dropped.div_(self.stats.sumexp[0])

    def output(self, name: str) -> Tensor:
        """One of the outputs, `[n]`, after the last tile."""
        assert self.output_stats is not None
        return self.output_stats.output(name, self.schedule.vocab)[0]

    def _update_output_stats(self, logits: Tensor, first_column: int) -> None:
        if self.outputs:
            arguments = (logits[None], self.labels[None], self.head.row_options, first_column, self.output_stats)
            self.output_stats = self.head.kernels.row_stats(*arguments, self.outputs)
