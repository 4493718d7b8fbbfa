"""The RPO family (arXiv 2502.00203): a distance between implicit rewards and targets."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .._checks import check_positive, is_number
from .ranking import best_responses

Distance = Literal["bwd_kl", "fwd_kl", "sq"]


@dataclass(frozen=True)
class RPO:
    """Distance between implicit rewards `a = beta * log_ratio` and targets `b = eta * reward` of a group's responses.

    With `p = softmax(a)`, `q = softmax(b)` and `d = a - b` over the K responses of a group, its loss is

        bwd_kl   sum_k q_k (log q_k - log p_k)
        fwd_kl   sum_k p_k (log p_k - log q_k)
        sq       1 / (2K) sum_k (d_k - mean_{j != k} d_j)^2

    which for K = 2 are the paper's pairwise forms (NeMo's `rpo_sq` lacks the 1/2). A group of one response has loss 0.

    Attributes:
        distance: which of the three.
        beta: implicit reward per unit of log-ratio; a scalar tensor to learn it, whose value is not checked.
        eta: target per unit of reward; the same.
        length_normalize: divide each log-ratio by the response's number of scored tokens.
        reference_free: the log-ratio is the policy's log-probability alone.
        target_margin: if given, only the best response by reward matters: the target is `target_margin` for it and 0
            for the others. Infinity (bwd_kl only) makes q one-hot; responses that tie for the best share it.
        gamma: margin subtracted from the best response's implicit reward (SimPO's gamma).

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    distance: Distance = "bwd_kl"
    beta: float | Tensor = 0.1
    eta: float | Tensor = 1.0
    length_normalize: bool = False
    reference_free: bool = False
    target_margin: float | None = None
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if self.distance not in get_args(Distance):
            raise ValueError(f"distance must be one of {get_args(Distance)}, got {self.distance!r}")
        for name in ("beta", "eta"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                check_positive(name, value)
            elif value.ndim or not value.is_floating_point():
                raise ValueError(f"{name} must be a number or a scalar tensor, got {value!r}")
        if not is_number(self.gamma) or not -math.inf < self.gamma < math.inf:
            raise ValueError(f"gamma must be a finite number, got {self.gamma!r}")
        if self.target_margin is not None:
            self._check_target_margin(self.target_margin)

    @property
    def is_constant(self) -> bool:
        """Whether no attribute is a tensor, which may require a gradient."""
        return not (isinstance(self.beta, Tensor) or isinstance(self.eta, Tensor))

    def _check_target_margin(self, value: float) -> None:
        if not is_number(value) or not value > -math.inf:
            raise ValueError(f"target_margin must be a number or inf, got {value!r}")
        if value == math.inf and self.distance != "bwd_kl":
            raise ValueError(f"target_margin=inf makes {self.distance!r} infinite; use distance='bwd_kl'")

    def __call__(self, log_ratios: Tensor, rewards: Tensor, present: Tensor | None = None) -> Tensor:
        """Loss of each group, `[G]`, from `[G, K]` log-ratios and rewards."""
        if present is None:
            present = torch.ones_like(rewards, dtype=torch.bool)
        # A reward that is not finite makes the loss NaN: x - x is NaN for it and 0 for any other.
        sound = 1 + torch.where(present, rewards - rewards, 0).sum(-1)
        return self._distance(log_ratios, rewards, present) * sound

    def _distance(self, log_ratios: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
        best = best_responses(rewards, present)
        implicit = self.beta * log_ratios - self.gamma * best.to(log_ratios.dtype)
        if self.distance == "sq":
            return _leave_one_out_square(implicit - self._targets(rewards, best), present)
        log_p = _log_softmax(implicit, present)
        q, log_q = self._target_distribution(rewards, best, present)
        if self.distance == "bwd_kl":
            return _kl(q, log_q, log_p)
        return _kl(log_p.exp(), log_p, log_q)

    def _targets(self, rewards: Tensor, best: Tensor) -> Tensor:
        if self.target_margin is None:
            return self.eta * rewards
        return self.target_margin * best.to(rewards.dtype)

    def _target_distribution(self, rewards: Tensor, best: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        if self.target_margin == math.inf:
            q = best.to(rewards.dtype) / best.sum(-1, keepdim=True)
            return q, q.log()
        log_q = _log_softmax(self._targets(rewards, best), present)
        return log_q.exp(), log_q


def _log_softmax(x: Tensor, present: Tensor) -> Tensor:
    return x.masked_fill(~present, -torch.inf).log_softmax(-1)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_k p_k (log p_k - log q_k), where 0 log 0 = 0 in value and gradient."""
    some = p != 0  # True for NaN too, which must not become 0.
    gap = torch.where(some, log_p, 0) - torch.where(some, log_q, 0)
    return torch.where(some, p * gap, 0).sum(-1)


def _leave_one_out_square(d: Tensor, present: Tensor) -> Tensor:
    """1 / (2K) sum_k (d_k - mean_{j != k} d_j)^2; d_k minus the others' mean is K / (K - 1) (d_k - mean d)."""
    size = present.sum(-1)
    d = torch.where(present, d, 0)
    mean = d.sum(-1, keepdim=True) / size.unsqueeze(-1)
    spread = torch.where(present, d - mean, 0).square().sum(-1)
    return spread * size / (2 * (size - 1).clamp(min=1) ** 2)
