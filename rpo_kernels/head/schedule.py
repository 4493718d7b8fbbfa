"""Which rows are scored, how rows and columns are cut, and where what is kept for backward lies."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import TokenOptions
from .plan import EDGE


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


class Needs(NamedTuple):
    """What a call is to give beside the log-probabilities."""

    hidden: bool  # gradients
    weight: bool
    bias: bool = False  # forward keeps for the bias what it keeps for the weight
    threshold: float | None = None  # of the gradient filter; None is exact


class Place(NamedTuple):
    """Where the U of one chunk and tile is kept."""

    offset: int = -1  # first element in `Saved.kept`; -1: not kept, backward recomputes it
    columns_offset: int = 0  # first of its active columns in `Saved.columns`
    columns: int = -1  # how many; -1: all columns of the tile


class Schedule:
    """How rows and columns are cut, and what is kept where; on the host."""

    def __init__(self, rows: int, vocab: int, chunk: int, tile: int, bounds: list[int]):
        self.sizes = (rows, vocab, chunk, tile)
        self.chunks = spans(rows, chunk)
        self.tiles = spans(vocab, tile)
        self.bounds = bounds  # for each tile, then the end: how many rows have a smaller label
        self.places = [[Place()] * len(self.tiles) for _ in self.chunks]

    def label_rows(self, rows: slice, tile: int) -> slice:
        """Those of some rows whose label lies in a tile."""
        start = min(max(rows.start, self.bounds[tile]), rows.stop)
        return slice(start, max(start, min(rows.stop, self.bounds[tile + 1])))

    def dump(self) -> Tensor:
        """As one tensor, for an operator to return."""
        places = [number for chunk in self.places for place in chunk for number in place]
        return torch.tensor([*self.sizes, *self.bounds, *places], dtype=torch.int64, device="cpu")

    @classmethod
    def load(cls, packed: Tensor) -> "Schedule":
        """Back from `dump`."""
        rows, vocab, chunk, tile, *numbers = packed.tolist()
        edges = len(spans(vocab, tile)) + 1
        schedule = cls(rows, vocab, chunk, tile, numbers[:edges])
        places = iter(Place(*numbers[i : i + 3]) for i in range(edges, len(numbers), 3))
        schedule.places = [[next(places) for _ in schedule.tiles] for _ in schedule.chunks]
        return schedule


class Saved(NamedTuple):
    """What forward leaves for backward, as outputs of the operator; a walk may leave any of them empty."""

    positions: Tensor  # [N] int64
    stats: Tensor  # [4, N]: logp, max, sumexp, label gain
    references: Tensor  # [tiles, N]: log s of the tiles of which something may be kept
    unit: Tensor  # [N, H]: dlogp/dhidden, not rounded; or [0, H]
    kept: Tensor  # flat: U
    active: Tensor  # flat uint8: active columns, counted from the tile's first, int32 each
    schedule: Tensor  # flat int64, on the CPU


class Forward(NamedTuple):
    """What forward gives: results of the scored rows, and what backward reads."""

    logps: Tensor  # [N]
    dropped: Tensor  # [N]: gradient mass that the filter left out
    saved: Saved


def spans(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
