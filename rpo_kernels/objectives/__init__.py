"""Group level: Reward-aware Preference Optimization (arXiv 2502.00203) and its special cases.

An objective is any callable `objective(log_ratios, rewards, present) -> group_losses` with `log_ratios` and `rewards`
`[G, K]` and `group_losses` `[G]`. `present` `[G, K]` bool marks the responses of ragged groups; None means all.
Three attributes are read if it has them: `beta` (implicit reward per log-ratio, default 1), `length_normalize` and
`reference_free` (default False).
"""

from collections.abc import Callable

from torch import Tensor

from .presets import CDPO, DPO, IPO, PRESETS, DistilledDPO, SimPO
from .ranking import best_responses, ranking_metrics
from .rpo import RPO, Distance

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]

__all__ = [
    "CDPO",
    "DPO",
    "IPO",
    "PRESETS",
    "RPO",
    "Distance",
    "DistilledDPO",
    "Objective",
    "SimPO",
    "best_responses",
    "ranking_metrics",
]
