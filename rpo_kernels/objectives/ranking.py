"""Ranking of responses within their group, by reward and by implicit reward."""

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 2**20


def best_responses(rewards: Tensor, present: Tensor) -> Tensor:
    """Which responses have their group's largest reward, `[G, K]` bool; ties are all best."""
    masked = rewards.masked_fill(~present, -torch.inf)
    return (masked == masked.amax(-1, keepdim=True)) & present


def ranking_metrics(implicit: Tensor, rewards: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How well implicit rewards rank the responses of each group: two scalars, NaN where no rewards differ.

    Returns:
        accuracy: share of the pairs within groups, rewards unequal, that implicit rewards order the same way; a tie
            counts one half, so a policy equal to its reference scores 1/2.
        margin: mean over groups of implicit reward of the best minus of the worst response by reward.
    """
    if present is None:
        present = torch.ones_like(rewards, dtype=torch.bool)
    ordered, agreeing, ranked = [], [], torch.zeros_like(present[:, 0])
    # Compares a part of the responses at a time: with many groups, G K^2 pairs would not fit in memory.
    part = max(1, _PAIRS_AT_ONCE // max(rewards.numel(), 1))
    for other in zip(*(x.split(part, -1) for x in (implicit, rewards, present))):
        pairs = present.unsqueeze(-1) & other[2].unsqueeze(-2) & (rewards.unsqueeze(-1) > other[1].unsqueeze(-2))
        lead = implicit.unsqueeze(-1) - other[0].unsqueeze(-2)
        agrees = (lead > 0).to(implicit.dtype) + (lead == 0).to(implicit.dtype) / 2
        ordered.append(pairs.sum())
        agreeing.append(torch.where(pairs, agrees, 0).sum())
        ranked = ranked | pairs.any(-1).any(-1)
    accuracy = sum(agreeing) / sum(ordered)

    best = rewards.masked_fill(~present, -torch.inf).argmax(-1, keepdim=True)
    worst = rewards.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
    spread = (implicit.gather(-1, best) - implicit.gather(-1, worst)).squeeze(-1)
    return accuracy, torch.where(ranked, spread, 0).sum() / ranked.sum()
