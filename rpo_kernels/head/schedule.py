"""The scored rows, the chunks and tiles, and the tensors saved for backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import TokenOptions
from ..kernels.kept import SharedTiles


class Rows(NamedTuple):
    """The scored rows, in the batch's order."""

    positions: Tensor  # [N] int64: places in the flattened labels
    labels: Tensor  # [N] int64


def find_rows(labels: Tensor, options: TokenOptions) -> Rows:
    """Scored rows of labels `[B, T]`. The only synchronisation in forward."""
    scored = labels != options.ignore_index
    if options.shift:
        scored[:, :1] = False
    positions = scored.flatten().nonzero().squeeze(1)
    return Rows(positions, labels.flatten()[positions].long())


class Needs(NamedTuple):
    """The gradients and outputs that a call must compute beside the log-probabilities."""

    hidden: bool  # gradients
    weight: bool
    bias: bool = False  # forward saves the same for the bias as for the weight
    threshold: float | None = None  # of the gradient filter; None is exact
    outputs: tuple[str, ...] = ()  # of `kernels.interface.OUTPUT_FIELDS`
    entropy: bool = False  # whether the entropy may have a gradient
    inplace: bool = False  # in backward: whether the weight's gradient overwrites `Saved.grad_weight`

    @property
    def filtered(self) -> bool:
        """Whether a filter is in use and backward recomputes the marked columns only."""
        return self.threshold is not None and (self.hidden or self.weight or self.bias)

    @property
    def deferred(self) -> bool:
        """Whether forward saves no gradient and backward recomputes the logits: with a filter, and for the entropy,
        whose gradient differs from the log-probability's by more than a factor of each row."""
        return self.filtered or (self.entropy and (self.hidden or self.weight or self.bias))


class Schedule:
    """How rows and columns are cut; on the host."""

    def __init__(self, rows: int, vocab: int, chunk: int, tile: int, kept_tiles: int, shared: SharedTiles):
        self.rows, self.vocab, self.chunk, self.tile = rows, vocab, chunk, tile
        self.kept_tiles, self.shared = kept_tiles, shared
        self.chunks = spans(rows, chunk)
        self.tiles = spans(vocab, tile)

    def dump(self) -> Tensor:
        """As one tensor, for an operator to return."""
        numbers = self.rows, self.vocab, self.chunk, self.tile, self.kept_tiles, *self.shared
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    @classmethod
    def load(cls, packed: Tensor) -> "Schedule":
        """Back from `dump`."""
        rows, vocab, chunk, tile, kept_tiles, *shared = packed.tolist()
        return cls(rows, vocab, chunk, tile, kept_tiles, SharedTiles(*shared))


class Saved(NamedTuple):
    """Tensors that forward saves for backward, as results of the operator; any of them may be empty."""

    positions: Tensor  # [N] int64
    stats: Tensor  # [4, N]: logp, a reference r, sum of exp(z - r), label's logit; then entropy, if differentiable
    references: Tensor  # [kept tiles, N]: the scale that makes the kept P, times -1, dlogp/dlogit
    grad_hidden: Tensor  # [N, H]: dlogp/dhidden, not rounded; or [0, H]
    kept: Tensor  # flat: P of the kept tiles, except those in `grad_weight`
    grad_weight: Tensor  # [V, H]: memory of the weight's gradient, with P of the first tiles until backward; or [0, H]
    active: Tensor  # flat uint8, [chunks, V]: columns that the filter left in
    schedule: Tensor  # flat int64, on the CPU

    @classmethod
    def nothing(cls, hidden: Tensor, positions: Tensor, stats: Tensor, schedule: Tensor) -> "Saved":
        """Where no backward pass follows, for hidden states `[M, H]`."""
        rows, mask = stats.new_empty(0, hidden.shape[1]), hidden.new_empty(0, dtype=torch.uint8)
        empty = hidden.new_empty(0, hidden.shape[1])
        return cls(positions, stats, stats.new_empty(0, 0), rows, empty.flatten(), empty, mask, schedule)


class Forward(NamedTuple):
    """Results of forward: of the scored rows, and the tensors saved for backward."""

    logps: Tensor  # [N]
    dropped: Tensor  # [N]: a bound of the gradient mass that the filter leaves out
    saved: Saved
    outputs: Tensor  # [outputs, N], in the order of `Needs.outputs`


def spans(total: int, step: int) -> list[slice]:
    """`range(total)` cut into slices of `step`."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
