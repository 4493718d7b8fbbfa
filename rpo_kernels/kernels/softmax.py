"""The online softmax of a chunk of rows, tile by tile: the reference implementation, with any backend's row kernels.

State of a row, in `RowStats`: `max` holds a reference r, `sumexp` the sum S of exp(z - r) over the columns so far, and
`label_logit` the label's logit. r is the log-sum-exp at some earlier tile: it is set to the current one only when
that lies more than SLACK above it. So S stays below e^SLACK, and values relative to r are rescaled rarely.
"""

import math

import torch
from torch import Tensor

from .interface import ActiveColumns, Backend, RowStats, TokenOptions
from .kept import KeptTiles

SLACK = 10 * math.log(2)  # exp(z - r) <= 2^10, which float16 can represent
LARGEST_ENTRY = 2.0**14  # of a saved P at the label's column; the largest float16 is below 2^16


class TileSoftmax:
    """Three passes, each over one tile of logits `[n, v]` or, at the end, over the rows."""

    def __init__(self, kernels: Backend):
        self.kernels = kernels

    def scale_rows(self, hidden: Tensor, factor: Tensor, before: Tensor | None, out: Tensor) -> None:
        """`out = factor * hidden`, `[n, H]`, rounded once; `before` holds the factors that `out` was computed with."""
        torch.mul(hidden, factor[:, None], out=out)

    def weigh(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        first_column: int,
        options: TokenOptions,
        references: Tensor,
        out: Tensor,
        sums: Tensor | None,
    ) -> None:
        """Continue the softmax and write P = exp(z - r) (1 - tanh^2), 0 at the label, to `out`.

        Args:
            logits: `[n, v]`, columns `first_column ... first_column + v` of the vocabulary.
            labels: `[n]` int64.
            stats: the state, `[1, n]` each, continued in place (not `logp`).
            references: `[n]`, where r of this tile is written.
            out: `[n, v]`, may be `logits`.
            sums: `[n, H]`, sums relative to the previous r, rescaled to the new one; or None.
        """
        tile = self.kernels.row_stats(logits[None], labels[None], options, first_column)
        before = stats.max.clone()
        base = _finite(torch.where(tile.max - before > SLACK, tile.max, before))
        sumexp = stats.sumexp * (before - base).exp() + tile.sumexp * (tile.max - base).exp()
        moves = (base != before) | (sumexp > math.exp(SLACK))
        stats.max.copy_(torch.where(moves, base + sumexp.log(), before))
        reference = _finite(stats.max)
        stats.sumexp.copy_(sumexp * (base - reference).exp())
        stats.label_logit.copy_(torch.maximum(stats.label_logit, tile.label_logit))
        references.copy_(stats.max[0])

        factor = (before - reference).exp()[0]
        if sums is not None and sums.device.type == "cpu":
            moved = (factor != 1).nonzero().squeeze(1)
            sums[moved] *= factor[moved, None]
        elif sums is not None:
            sums *= factor[:, None]  # an index would make the host wait for the device
        # With logp = 0 the label's entry, 1 - p, is 0.
        zeros, ones = torch.zeros_like(reference), torch.ones_like(reference)
        relative = RowStats(logp=zeros, max=reference, sumexp=ones, label_logit=zeros)
        scale = ones * (-options.temperature / options.logit_scale)
        self.kernels.row_grad(logits[None], labels[None], relative, scale, options, first_column, out[None])

    def mark(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        first_column: int,
        options: TokenOptions,
        label_logits: Tensor,
        active: ActiveColumns,
        dropped: Tensor,
    ) -> None:
        """Continue the softmax and mark the columns that may hold |dlogp / dlogit| above a threshold in some row.

        A probability of the softmax over all columns is at most that over the columns so far and the label's, which is
        compared with the threshold.

        Args:
            logits, labels, first_column: as in `weigh`; the logits are overwritten.
            stats: the state, continued; begun with `label_logits` for `max` and 0 for `sumexp`.
            label_logits: `[n]`, transformed; -inf for a label out of range.
            active: its mask, `[v]`, holds 1 at labels' columns and gets 1 where the threshold is exceeded.
            dropped: `[n]`, the sum of |dlogp / dlogit| over columns left at 0, times the state's `sumexp`; continued.
        """
        before = stats.max.clone()
        self.kernels.row_stats(logits[None], labels[None], options, first_column, stats)
        reference = _finite(stats.max)
        later = labels >= first_column + logits.shape[1]
        sumexp = stats.sumexp + torch.where(later, (label_logits - reference).exp(), 0)
        zeros, ones = torch.zeros_like(reference), torch.ones_like(reference)
        bound = RowStats(logp=zeros, max=reference, sumexp=sumexp, label_logit=zeros)
        grad_logits = logits if logits.dtype == dropped.dtype else torch.empty_like(logits, dtype=dropped.dtype)
        self.kernels.row_grad(logits[None], labels[None], bound, ones, options, first_column, grad_logits[None], active)
        mass = grad_logits @ (active.mask == 0).to(grad_logits.dtype)  # off the labels dlogp / dlogit is negative
        dropped.mul_((before - reference).exp()[0]).sub_(mass.mul_(sumexp[0]))

    def finish(
        self,
        stats: RowStats,
        labels: Tensor,
        options: TokenOptions,
        references: Tensor,
        sums: Tensor | None,
        weight: Tensor,
        kept: KeptTiles,
    ) -> None:
        """End of a chunk: log-probabilities, gradient of the hidden states, labels' entries of the saved tiles.

        Args:
            stats: the state; its `logp` is written.
            references: `[kept tiles, n]`, r of each tile; overwritten with the scale s that makes a tile's P, times -s,
                dlogp / dlogit.
            sums: `[n, H]`, sum over the columns of P W relative to the last r; overwritten with dlogp / dhidden; or
                None.
            weight: `[V, H]`.
            kept: P of the tiles, to which the label's entry is written; the chunk's rows of it.
        """
        logp, reference, sumexp = stats.logp[0], stats.max[0], stats.sumexp[0]
        write_logp(stats)
        slope = options.logit_scale / options.temperature
        column = labels.clamp(0, len(weight) - 1)
        # A label out of range has no column.
        gain = torch.where(column == labels, -torch.expm1(logp) * _slope(stats.label_logit[0], options), 0)
        last_scale = slope / sumexp
        if sums is not None:
            sums.mul_(-last_scale[:, None])
            sums.addcmul_(gain[:, None], weight.index_select(0, column).to(sums.dtype))
        rows = torch.arange(len(labels), device=labels.device)
        for tile in range(kept.tiles):
            scale = references[tile].sub_(reference).exp_().mul_(last_scale)
            probabilities = kept.tile(tile)
            first = tile * kept.tile_columns
            here = (labels >= first) & (labels < first + probabilities.shape[1])
            # If r has moved far since, the entry could overflow the saved dtype: rescale the row.
            far = here & (gain > LARGEST_ENTRY * scale)
            if probabilities.device.type != "cpu" or far.any():
                rescale = torch.where(far, scale / last_scale, 1)[:, None]
                probabilities.mul_(rescale.to(probabilities.dtype))
            scale.copy_(torch.where(far, last_scale, scale))
            at = (column - first).clamp(0, probabilities.shape[1] - 1)
            entry = torch.where(here, (-gain / scale).to(probabilities.dtype), probabilities[rows, at])
            probabilities[rows, at] = entry


def write_logp(stats: RowStats) -> None:
    """The label's log-probability from the rest of the state."""
    torch.sub(stats.label_logit - stats.max, stats.sumexp.log(), out=stats.logp)


def _finite(reference: Tensor) -> Tensor:
    """Replaces a maximum of -inf by 0, so that the exponentials of -inf are 0."""
    return torch.where(reference == -torch.inf, 0, reference)


def _slope(label_logit: Tensor, options: TokenOptions) -> Tensor | float:
    """`dz / dlogit` at a transformed logit z."""
    slope = options.logit_scale / options.temperature
    if options.softcap is None:
        return slope
    return slope * (1 - (label_logit * options.temperature / options.softcap) ** 2).clamp(min=0)
