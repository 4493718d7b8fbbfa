"""The interface of a backend of the token level, and its types.

A backend is a module with the two functions of `Backend`. `reference` implements them in plain torch; `triton` and
`native` are tested against it.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._checks import check_integer, check_positive


class TokenOptions(NamedTuple):
    """How logits become log-probabilities: `z = softcap * tanh(logit_scale * x / softcap) / temperature`.

    With `shift=True` labels align with the input ids: logits at `t - 1` predict `labels[:, t]`.
    Positions whose label is `ignore_index` are not scored.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    shift: bool = False

    def check(self) -> None:
        """Raise ValueError for a scale, cap or temperature that is not a positive finite number."""
        check_positive("logit_scale", self.logit_scale)
        check_positive("temperature", self.temperature)
        if self.softcap is not None:
            check_positive("softcap", self.softcap)
        check_integer("ignore_index", self.ignore_index)


class ActiveColumns(NamedTuple):
    """Output of `row_grad`: the columns of a tile whose gradient exceeds a threshold."""

    mask: Tensor  # [v] uint8; set to 1 where |gradient| > threshold or NaN in any scored row, else unchanged
    threshold: float


def row_length(columns: int) -> int:
    """Elements from one row of a tile to the next: a multiple of 16, which GEMMs and kernels read fastest."""
    return -(-columns // 16) * 16


class EntropyGrad(NamedTuple):
    """The entropy's gradient, `-p (log p + entropy)`, for `row_grad` to add in the same pass."""

    entropy: Tensor  # [B, T], of the whole rows
    factor: Tensor  # [B, T]: dL/dentropy, any strides


# The outputs beside the log-probability, and the field of `RowStats` that each is computed from.
OUTPUT_FIELDS = {
    "entropy": "sum_exp_z",
    "mean_logit": "sum_z",
    "is_top1": "max_before_label",
    "log_sum_sq_probs": "sum_sq_exp",
}


class RowStats(NamedTuple):
    """Statistics of each label position's row over the columns seen so far, every field `[B, T]`, float32
    (float64 for float64 logits). A position that is not scored holds 0 everywhere, but `sumexp` and `sum_sq_exp` 1.

    `max` and `sumexp` are kept apart because their sum, the log-sum-exp, would round away what the gradient needs.
    """

    logp: Tensor  # label_logit - max - log(sumexp)
    max: Tensor  # max_v z_v
    sumexp: Tensor  # sum_v exp(z_v - max)
    label_logit: Tensor  # z[label], -inf while that column has not been seen (a label outside [0, V): never)
    # None, unless an output needs it:
    sum_exp_z: Tensor | None = None  # sum_v exp(z_v - max) (z_v - max)
    sum_z: Tensor | None = None  # sum_v z_v
    max_before_label: Tensor | None = None  # max_{v < label} z_v, -inf if there is none
    sum_sq_exp: Tensor | None = None  # sum_v exp(z_v - max)^2

    @classmethod
    def empty(cls, labels: Tensor, outputs: tuple[str, ...]) -> "RowStats":
        """Uninitialised float32 statistics of these labels, with the fields that the outputs need."""
        first = torch.empty_like(labels, dtype=torch.float32, memory_format=torch.contiguous_format)
        extra = {OUTPUT_FIELDS[name]: torch.empty_like(first) for name in outputs}
        return cls(first, torch.empty_like(first), torch.empty_like(first), torch.empty_like(first), **extra)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that can be computed from the fields that are not None."""
        return tuple(name for name, field in OUTPUT_FIELDS.items() if getattr(self, field) is not None)

    def output(self, name: str, vocab: int) -> Tensor:
        """The output of a finished row over `vocab` columns; 0 where not scored.

        `entropy` in nats, `mean_logit` of the transformed logits (infinite where their sum is), `is_top1` (1 where the
        label's logit is the largest, of equal ones the first, else 0), `log_sum_sq_probs` (log of the sum of squared
        probabilities).
        """
        field = getattr(self, OUTPUT_FIELDS[name])
        if name == "entropy":
            return (self.sumexp.log() - field / self.sumexp).clamp_(min=0)
        if name == "mean_logit":
            return field / vocab
        if name == "is_top1":
            return ((self.label_logit >= self.max) & (self.label_logit > field)).to(field.dtype)
        return (field.log() - 2 * self.sumexp.log()).clamp_(max=0)


class Backend(Protocol):
    """Two functions over logits `[B, T, v]`, a tile of the vocabulary's columns, and labels `[B, T]`."""

    def row_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        options: TokenOptions = ...,
        first_column: int = ...,
        running: RowStats | None = ...,
        outputs: tuple[str, ...] = ...,
    ) -> RowStats:
        """See `reference.row_stats`."""
        ...

    def row_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        stats: RowStats,
        grad_logps: Tensor,
        options: TokenOptions = ...,
        first_column: int = ...,
        out: Tensor | None = ...,
        active: ActiveColumns | None = ...,
        entropy: EntropyGrad | None = ...,
    ) -> Tensor:
        """See `reference.row_grad`."""
        ...
