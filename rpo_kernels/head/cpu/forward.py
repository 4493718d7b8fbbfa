"""Forward: log-probabilities and outputs of the scored rows, the hidden states' gradient, P of the kept tiles."""

import functools
import math

import torch
from torch import Tensor

from ...kernels import native_head
from ...kernels.interface import TokenOptions
from ...kernels.native_head import OutputRows, Running
from ..plan import MemoryPlan
from ..schedule import Forward, Needs, Rows, Saved, spans
from ..tiles import Head
from .plan import LABEL_ROWS
from .work import Cuts, Work, gather, padded, unpacked


def forward(head: Head, rows: Rows, plan: MemoryPlan, needs: Needs) -> Forward:
    """Log-probabilities of the scored rows, what the filter dropped, what backward reads, and outputs."""
    vocab, width = head.weight.shape
    count = len(rows.positions)
    cuts = Cuts(count, vocab, width, plan.chunk_rows, plan.tile_columns, plan.kept_tiles, plan.shared)
    differentiates = needs.hidden and not needs.deferred
    stats = head.hidden.new_zeros(6 if needs.entropy else 4, count, dtype=torch.float32)
    dropped, outputs = stats.new_zeros(count), stats.new_empty(len(needs.outputs), count)
    saved = Saved(
        positions=rows.positions,
        stats=stats,
        references=stats.new_empty(cuts.kept_tiles, count),
        grad_hidden=stats.new_empty(count if differentiates else 0, width),
        kept=head.hidden.new_empty(cuts.kept_size()),
        grad_weight=head.hidden.new_empty(vocab if cuts.shared.tiles else 0, width),
        active=head.hidden.new_zeros(len(cuts.chunks) * vocab if needs.filtered else 0, dtype=torch.uint8),
        schedule=cuts.dump(),
    )
    work = Work(head, cuts, pairs=differentiates, grad_logits=needs.filtered)
    for number, span in enumerate(cuts.chunks):
        marks = saved.active[number * vocab : (number + 1) * vocab] if needs.filtered else None
        chunk = _Chunk(work, rows.positions[span], rows.labels[span], marks, needs)
        for tile, columns in enumerate(cuts.tiles):
            kept = cuts.kept(saved.kept, saved.grad_weight, tile, number) if tile < cuts.kept_tiles else None
            chunk.read(columns, kept)
            if kept is not None:
                saved.references[tile, span] = chunk.reference[: len(chunk.labels)]
        stats[:4, span] = chunk.stats()
        for output, name in zip(outputs[:, span], needs.outputs):
            output.copy_(chunk.output(name, stats[0, span]))
        if needs.entropy:
            stats[4:, span] = chunk.entropy_stats(stats[0, span])
        if differentiates:
            chunk.write_grad_hidden(stats[:, span], saved.grad_hidden[span])
        if marks is not None:
            dropped[span] = chunk.dropped_mass(stats[2, span])
        del chunk
    return Forward(stats[0].clone(), dropped, saved, outputs)


class _Chunk:
    """The running softmax and gradient of a chunk of rows. Tensors with a number per row are padded to panels."""

    def __init__(self, work: Work, positions: Tensor, labels: Tensor, marks: Tensor | None, needs: Needs):
        self.work, self.labels, self.marks = work, labels, marks
        self.options, self.rows = work.head.options, len(labels)
        hidden = gather(work.head, positions)
        self.logits = _label_logits(hidden, work.head, labels)
        self.shapes = work.cuts.buffers._replace(rows=self.rows)
        self.lanes = work.packed(self.shapes.lanes)
        native_head.pack_hidden(hidden, self.lanes, None)
        self.bits, self.slope = _transform(self.logits, self.options)
        self.label = padded(self.bits.float(), math.inf)  # so that no padding marks a column
        self.columns = padded(labels.int(), -1)
        self.reference = padded(self.bits.float().ceil().clamp(min=-1e30), 0)
        self.sum = torch.zeros(len(self.reference), dtype=torch.float64, device="cpu")
        self.gradient = (
            torch.zeros(self.shapes.gradient, dtype=torch.float32, device="cpu") if work.pairs is not None else None
        )
        self.dropped = torch.zeros_like(self.sum)
        self.outputs = OutputRows.empty(len(self.sum)) if needs.outputs else None
        self.threshold = (needs.threshold or 0.0) * self.options.temperature / self.options.logit_scale
        if marks is not None:
            marks.index_fill_(0, labels, 1)

    def read(self, columns: slice, kept: Tensor | None) -> None:
        """Continue the softmax, and the hidden states' gradient, with a tile."""
        tile = self.work.tile(columns, None, self.lanes, self.columns - columns.start, self.rows)
        grad_logits = self.work.grad_logits if kept is None else kept
        tile = tile._replace(gradient=self.gradient, grad_logits=grad_logits, stream=kept is not None)
        running = Running(self.reference, self.sum, self.label, outputs=self.outputs)
        if self.marks is not None:
            running = running._replace(marks=self.marks[columns], dropped=self.dropped, threshold=self.threshold)
        native_head.forward(tile, running)

    @functools.cached_property
    def above(self) -> Tensor:
        """The label's logit above the reference, in bits, `[n]` float64."""
        return self.bits - self.reference[: self.rows].double()

    def stats(self) -> Tensor:
        """Of the finished rows: logp, reference, scale, label gain. `p = scale * P`, without the transform's slope."""
        others, reference = self.sum[: self.rows], self.reference[: self.rows].double()
        # From logarithms: of a label far below the other columns the ratio would overflow.
        ratio = others.double().log() - self.above * math.log(2)
        logp = -torch.logaddexp(torch.zeros_like(ratio), ratio)
        scale = (self.options.logit_scale / self.options.temperature) / (others + torch.exp2(self.above))
        return torch.stack((logp, reference, scale, -torch.expm1(logp) * self.slope)).float()

    def output(self, name: str, logp: Tensor) -> Tensor:
        """One of `OUTPUT_FIELDS`, `[n]` float64: from the sums over the other columns and the label's own term."""
        assert self.outputs is not None
        rows = OutputRows(*(x[: self.rows] for x in self.outputs))
        label = torch.exp2(self.above)
        sumexp = self.sum[: self.rows] + label
        if name == "mean_logit":
            return (rows.sum_z + self.bits) * (math.log(2) / self.work.cuts.vocab)
        if name == "entropy":
            sum_exp_z = rows.sum_exp_z + torch.where(label > 0, label * self.above, 0)
            return (sumexp.log() - sum_exp_z / sumexp * math.log(2)).clamp_(min=0)
        if name == "is_top1":
            before, after, own = (_transform(x.double(), self.options)[0] for x in rows[3:])
            return ((own > before) & (own >= after) & ~logp.isnan()).double()
        return ((rows.sum_sq_exp + label.square()).log() - 2 * sumexp.log()).clamp_(max=0)

    def entropy_stats(self, logp: Tensor) -> Tensor:
        """For the entropy's gradient, `-p (log p + entropy)`: the entropy, and its gradient at the label."""
        entropy = self.output("entropy", logp)
        finite = logp.double().clamp(min=-1e4)  # where p is 0, p log p is 0
        return torch.stack((entropy, -finite.exp() * (finite + entropy) * self.slope))

    def write_grad_hidden(self, stats: Tensor, out: Tensor) -> None:
        """`dlogp/dhidden = gain W[label] - scale sum of P W`."""
        assert self.gradient is not None
        torch.mul(unpacked(self.gradient, self.rows, out.shape[1]), -stats[2, :, None], out=out)
        for part in spans(self.rows, LABEL_ROWS):
            out[part].addcmul_(stats[3, part, None], self.work.head.weight[self.labels[part]].float())

    def dropped_mass(self, scale: Tensor) -> Tensor:
        """A bound of the sum of |dlogp / dlogit| over the columns without a mark."""
        rounding = 1 + 2.0**-8  # of P to bfloat16
        return (self.dropped[: self.rows] * scale * rounding).float()


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
