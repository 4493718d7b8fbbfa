"""Sequence level: which tokens form a sequence, and which sequences form a group.

Index structure only: built from the arguments that describe the batch, checked once, then used by the operators.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ._checks import INTEGER, check_device, check_integer, check_tensor, checks_values

Layout = Literal["grouped", "stacked"]


@dataclass(frozen=True)
class Segments:
    """The sequences of a batch: rows of padded `[B, T]` tokens, or slices of packed `[total]` tokens."""

    count: int
    cu_seqlens: Tensor | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum per-token values to `[B]`, in a fixed order."""
        if self.cu_seqlens is None:
            return values.sum(-1)
        return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens.long(), initial=0)

    def spread(self, per_sequence: Tensor, tokens: Tensor) -> Tensor:
        """Give each token of the shape of `tokens` its sequence's value; a view of padded batches."""
        if self.cu_seqlens is None:
            return per_sequence.unsqueeze(-1).expand(tokens.shape)
        return per_sequence.repeat_interleave(self.cu_seqlens.diff(), output_size=tokens.numel())

    def scored(self, labels: Tensor, ignore_index: int, shift: bool) -> Tensor:
        """Which tokens are scored, bool of the labels' shape: not ignored, and not first if `shift`."""
        scored = labels != ignore_index
        return scored & ~self.starts(labels) if shift else scored

    def starts(self, labels: Tensor) -> Tensor:
        """Which tokens are the first of their sequence, bool of the labels' shape."""
        if self.cu_seqlens is None:
            return torch.arange(labels.shape[-1], device=labels.device) == 0
        # One position more than there are tokens, for empty sequences at the end.
        starts = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=labels.device)
        return starts.index_fill(0, self.cu_seqlens[:-1].long(), True)[:-1]


@dataclass(frozen=True)
class Groups:
    """The groups of a batch of sequences, `[G, K]`.

    Response k of group g is sequence `g * group_stride + k * response_stride`, or `index[g, k]` for ragged groups,
    where -1 stands for an absent response.
    """

    count: int
    size: int
    group_stride: int = 0
    response_stride: int = 0
    index: Tensor | None = None

    def gather(self, per_sequence: Tensor) -> Tensor:
        """Arrange `[B]` values as `[G, K]`; absent responses hold 0."""
        if self.index is None and self.response_stride == 1:
            return per_sequence.reshape(self.count, self.size)
        if self.index is None:
            return per_sequence.reshape(self.size, self.count).T
        return torch.where(self.index >= 0, per_sequence[self.index.clamp(min=0)], 0)

    def spread(self, per_group: Tensor, num_sequences: int) -> Tensor:
        """Give each sequence its group's value, `[G]` to `[B]`."""
        values = per_group.unsqueeze(-1).expand(self.count, self.size)
        if self.index is None:
            return (values if self.response_stride == 1 else values.T).reshape(-1)
        # Absent responses write to one place past the end.
        target = torch.where(self.index >= 0, self.index, num_sequences)
        return per_group.new_zeros(num_sequences + 1).scatter(0, target.reshape(-1), values.reshape(-1))[:-1]

    @property
    def present(self) -> Tensor | None:
        """Which responses of `[G, K]` are there; None when all are."""
        return None if self.index is None else self.index >= 0


def find_segments(labels: Tensor, cu_seqlens: Tensor | None) -> Segments:
    """Segments of padded labels `[B, T]`, or of packed labels `[total]` with `cu_seqlens` `[B + 1]`.

    Raises:
        ValueError: naming `labels` or `cu_seqlens`, if their shapes, dtypes or values do not fit.
    """
    if cu_seqlens is None:
        if labels.ndim != 2:
            raise ValueError(f"labels must be [B, T], or [total] with cu_seqlens; got shape {list(labels.shape)}")
        return Segments(labels.shape[0])
    if labels.ndim != 1:
        raise ValueError(f"labels must be [total] where cu_seqlens is given; got shape {list(labels.shape)}")
    check_tensor("cu_seqlens", cu_seqlens, INTEGER)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be [B + 1]; got shape {list(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, labels.device, "the labels'")
    if checks_values(cu_seqlens):
        _check_cu_seqlens(cu_seqlens.tolist(), labels.numel())
    elif cu_seqlens.device.type == "cpu":  # compiled: checked when the graph runs
        bounds = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == labels.numel()) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(bounds, f"cu_seqlens must rise from 0 to the {labels.numel()} tokens of labels")
    return Segments(cu_seqlens.numel() - 1, cu_seqlens)


def find_groups(
    num_sequences: int,
    num_responses: int,
    layout: Layout,
    group_ids: Sequence[int] | Tensor | None,
    device: torch.device,
) -> Groups:
    """Groups of `num_responses` sequences in the given layout, or the ragged groups that `group_ids` tells.

    Args:
        num_sequences: B.
        num_responses: K; not read where `group_ids` is given.
        layout: `"grouped"` (x1y1 x1y2 x2y1 x2y2) or `"stacked"` (x1y1 x2y1 x1y2 x2y2).
        group_ids: B integers, equal for responses to the same prompt. On an accelerator, a tensor costs a
            synchronisation; a list or a CPU tensor does not. A tensor breaks a compiled graph, which is an error under
            `fullgraph=True`: there it has to be a list.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if group_ids is not None:
        return _ragged_groups(num_sequences, group_ids, device)
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    check_integer("num_responses", num_responses)
    if num_responses < 1 or num_sequences % num_responses:
        raise ValueError(
            f"num_responses must divide the number of sequences; got {num_responses} for {num_sequences} sequences"
        )
    count = num_sequences // num_responses
    if layout == "grouped":
        return Groups(count, num_responses, group_stride=num_responses, response_stride=1)
    return Groups(count, num_responses, group_stride=1, response_stride=count)


def _ragged_groups(num_sequences: int, group_ids: Sequence[int] | Tensor, device: torch.device) -> Groups:
    ids = _integers(group_ids)
    if len(ids) != num_sequences:
        raise ValueError(f"group_ids must have one id for each of the {num_sequences} sequences; got {len(ids)}")
    members: dict[int, list[int]] = {}
    for sequence, group in enumerate(ids):
        members.setdefault(group, []).append(sequence)
    size = max([len(group) for group in members.values()] or [1])
    padded = [group + [-1] * (size - len(group)) for group in members.values()]
    index = torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(padded), size)
    return Groups(len(padded), size, index=index.to(device, non_blocking=True))


def _integers(group_ids: Sequence[int] | Tensor) -> list[int]:
    if isinstance(group_ids, Tensor):
        if group_ids.ndim != 1 or group_ids.is_floating_point():
            raise ValueError(
                f"group_ids must be one-dimensional integers; got {group_ids.dtype} of shape {list(group_ids.shape)}"
            )
        if torch.compiler.is_compiling():  # an error under fullgraph=True
            torch._dynamo.graph_break(msg="group_ids must be a list in a graph, whose shapes it decides; got a tensor")
        return group_ids.tolist()
    try:
        return [operator.index(x) for x in group_ids]  # tensors among them by value, not by identity
    except TypeError:
        raise ValueError(f"group_ids must be a tensor or a sequence of integers; got {group_ids!r}") from None


def _check_cu_seqlens(offsets: list[int], total: int) -> None:
    rising = all(a <= b for a, b in pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != total or not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to the {total} tokens of labels; got {offsets}")
