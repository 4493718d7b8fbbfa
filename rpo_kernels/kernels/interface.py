"""What a backend of the token level provides, and the small types it speaks in.

A backend is a module with two functions over logits `[B, T, V]` and labels `[B, T]`:

    row_stats(logits, labels, options, first_column=0, running=None, extras=False) -> RowStats
    row_grad(logits, labels, stats, grad_logps, options, first_column=0, out=None, active=None) -> Tensor

`reference` states both in plain torch; `triton` and `native` are tested against it.
"""

import math
from typing import NamedTuple

from torch import Tensor


class TokenOptions(NamedTuple):
    """How logits become log-probabilities: `z = softcap * tanh(logit_scale * x / softcap) / temperature`.

    `shift=True` says that labels stand beside the input ids, so logits at `t - 1` predict `labels[:, t]`.
    Positions whose label is `ignore_index` are not scored.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    shift: bool = False

    def check(self) -> None:
        """Raise ValueError for a scale, cap or temperature that is not a positive finite number."""
        for name in ("logit_scale", "softcap", "temperature"):
            value = getattr(self, name)
            if name == "softcap" and value is None:
                continue
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")


class ActiveColumns(NamedTuple):
    """For `row_grad` to fill as it passes: which columns of a tile hold a gradient that counts."""

    mask: Tensor  # [v] uint8; set to 1 where |gradient| > threshold or NaN in any scored row, else left as it is
    threshold: float


class RowStats(NamedTuple):
    """Statistics of each label position's row over the columns seen so far, every field `[B, T]`, float32
    (float64 for float64 logits). A position that is not scored holds 0 everywhere, but `sumexp` 1.

    `max` and `sumexp` are kept apart because their sum, the log-sum-exp, would round away what the gradient needs.
    """

    logp: Tensor  # label_logit - max - log(sumexp)
    max: Tensor  # max_v z_v
    sumexp: Tensor  # sum_v exp(z_v - max)
    label_logit: Tensor  # z[label], -inf while that column has not been seen (a label outside [0, V): never)
    weighted: Tensor | None = None  # sum_v exp(z_v - max) (z_v - max), if extras
    total: Tensor | None = None  # sum_v z_v, if extras

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the row."""
        return self.max + self.sumexp.log()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the row's distribution in nats (needs extras)."""
        assert self.weighted is not None, "row_stats(extras=True) computes what entropy needs"
        return self.sumexp.log() - self.weighted / self.sumexp

    @property
    def is_argmax(self) -> Tensor:
        """Whether the label's logit is the largest of its row, bool."""
        return self.label_logit >= self.max
