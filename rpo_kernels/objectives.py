"""Group level: Reward-aware Preference Optimization (arXiv 2502.00203) and its special cases.

An objective is any callable `objective(log_ratios, rewards, present) -> group_losses` with `log_ratios` and `rewards`
`[G, K]` and `group_losses` `[G]`. `present` `[G, K]` bool marks the responses of ragged groups; None means all.
Three attributes are read if it has them: `beta` (implicit reward per log-ratio, default 1), `length_normalize` and
`reference_free` (default False).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Distance = Literal["bwd_kl", "fwd_kl", "sq"]
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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
        beta: implicit reward per unit of log-ratio.
        eta: target per unit of reward.
        length_normalize: divide each log-ratio by the response's number of scored tokens.
        reference_free: the log-ratio is the policy's log-probability alone.
        target_margin: if given, rewards only tell which response is best: the target is `target_margin` for it and 0
            for the others. Infinite (bwd_kl only) puts all of q on it; responses that tie for the best share it.
        margin: by how much the best response's implicit reward must lead before it counts (SimPO's gamma).

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    distance: Distance = "bwd_kl"
    beta: float = 0.1
    eta: float = 1.0
    length_normalize: bool = False
    reference_free: bool = False
    target_margin: float | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.distance not in get_args(Distance):
            raise ValueError(f"distance must be one of {get_args(Distance)}, got {self.distance!r}")
        for name in ("beta", "eta"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be a finite number, got {self.margin!r}")
        if self.target_margin is not None:
            self._check_target_margin(self.target_margin)

    def _check_target_margin(self, value: float) -> None:
        if math.isnan(value) or value == -math.inf:
            raise ValueError(f"target_margin must be a number or inf, got {value!r}")
        if value == math.inf and self.distance != "bwd_kl":
            raise ValueError(f"target_margin=inf makes {self.distance!r} infinite; use distance='bwd_kl'")

    def __call__(self, log_ratios: Tensor, rewards: Tensor, present: Tensor | None = None) -> Tensor:
        """Loss of each group, `[G]`, from `[G, K]` log-ratios and rewards."""
        if present is None:
            present = torch.ones_like(rewards, dtype=torch.bool)
        # A reward that is not finite must not pass unseen: x - x is NaN for it and 0 for any other.
        sound = 1 + torch.where(present, rewards - rewards, 0).sum(-1)
        return self._distance(log_ratios, rewards, present) * sound

    def _distance(self, log_ratios: Tensor, rewards: Tensor, present: Tensor) -> Tensor:
        best = best_responses(rewards, present)
        implicit = self.beta * log_ratios - self.margin * best
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
            q = best / best.sum(-1, keepdim=True)
            return q, q.log()
        log_q = _log_softmax(self._targets(rewards, best), present)
        return log_q.exp(), log_q


def best_responses(rewards: Tensor, present: Tensor) -> Tensor:
    """Which responses have their group's largest reward, `[G, K]` bool; ties are all best."""
    masked = rewards.masked_fill(~present, -torch.inf)
    return (masked == masked.amax(-1, keepdim=True)) & present


def agreement(implicit: Tensor, rewards: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How well implicit rewards rank the responses of each group: two scalars, NaN where no rewards differ.

    Returns:
        accuracy: share of the pairs within groups, rewards unequal, that implicit rewards order the same way; a tie
            counts one half, so a policy equal to its reference scores 1/2.
        margin: mean over groups of implicit reward of the best minus of the worst response by reward.
    """
    if present is None:
        present = torch.ones_like(rewards, dtype=torch.bool)
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2) & (rewards.unsqueeze(-1) > rewards.unsqueeze(-2))
    lead = implicit.unsqueeze(-1) - implicit.unsqueeze(-2)
    agrees = (lead > 0).to(implicit.dtype) + 0.5 * (lead == 0)
    accuracy = torch.where(pairs, agrees, 0).sum() / pairs.sum()

    best = rewards.masked_fill(~present, -torch.inf).argmax(-1, keepdim=True)
    worst = rewards.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
    spread = (implicit.gather(-1, best) - implicit.gather(-1, worst)).squeeze(-1)
    ranked = pairs.any(-1).any(-1)
    return accuracy, torch.where(ranked, spread, 0).sum() / ranked.sum()


def DPO(beta: float = 0.1) -> RPO:
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7): the best response is all the target."""
    return RPO("bwd_kl", beta=beta, target_margin=math.inf)


def CDPO(beta: float = 0.1, epsilon: float = 0.1) -> RPO:
    """Conservative DPO (Mitchell 2023): labels are wrong with probability `epsilon`.

    Equal to the paper's cross-entropy up to the entropy of the label noise, a constant.

    Raises:
        ValueError: if `epsilon` is not in (0, 0.5) or `beta` not positive and finite.
    """
    if not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon must lie in (0, 0.5), got {epsilon!r}")
    return RPO("bwd_kl", beta=beta, target_margin=math.log((1 - epsilon) / epsilon))


def IPO(beta: float = 0.1) -> RPO:
    """Identity Preference Optimization (arXiv 2310.12036, eq. 17): `(log-ratio margin - 1 / (2 beta))^2`.

    `beta` is the paper's tau. The squared distance carries a factor 1/2, so implicit rewards are scaled by sqrt(2).

    Raises:
        ValueError: if `beta` is not positive and finite.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a positive finite number, got {beta!r}")
    return RPO("sq", beta=math.sqrt(2), target_margin=math.sqrt(2) / (2 * beta))


def SimPO(beta: float = 2.0, gamma: float = 1.0) -> RPO:
    """Simple Preference Optimization (arXiv 2405.14734, eq. 6): length-normalised, reference-free, with a margin.

    Raises:
        ValueError: if `beta` is not positive and finite, or `gamma` not finite.
    """
    return RPO("bwd_kl", beta=beta, target_margin=math.inf, margin=gamma, length_normalize=True, reference_free=True)


def DistilledDPO(beta: float = 0.1, eta: float = 1.0) -> RPO:
    """Reward-model distillation (arXiv 2405.19316, eq. 7): squared error between implicit and given reward gaps."""
    return RPO("sq", beta=beta, eta=eta)


# By the names that the command line knows them by.
PRESETS: dict[str, Callable[..., RPO]] = {
    "rpo": RPO,
    "dpo": DPO,
    "cdpo": CDPO,
    "ipo": IPO,
    "simpo": SimPO,
    "distilled_dpo": DistilledDPO,
}


def _log_softmax(x: Tensor, present: Tensor) -> Tensor:
    return x.masked_fill(~present, -torch.inf).log_softmax(-1)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_k p_k (log p_k - log q_k), where 0 log 0 = 0 in value and gradient."""
    some = p != 0  # true of NaN, which must not pass for 0
    gap = torch.where(some, log_p, 0) - torch.where(some, log_q, 0)
    return torch.where(some, p * gap, 0).sum(-1)


def _leave_one_out_square(d: Tensor, present: Tensor) -> Tensor:
    """1 / (2K) sum_k (d_k - mean_{j != k} d_j)^2; d_k minus the others' mean is K / (K - 1) (d_k - mean d)."""
    size = present.sum(-1)
    d = torch.where(present, d, 0)
    mean = d.sum(-1, keepdim=True) / size.unsqueeze(-1)
    spread = torch.where(present, d - mean, 0).square().sum(-1)
    return spread * size / (2 * (size - 1).clamp(min=1) ** 2)
