"""Published objectives that are special cases of RPO."""

import math
from collections.abc import Callable

from .._checks import check_positive, is_number
from .rpo import RPO


def DPO(beta: float = 0.1) -> RPO:
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7): the best response is the one-hot target."""
    return RPO("bwd_kl", beta=beta, target_margin=math.inf)


def CDPO(beta: float = 0.1, epsilon: float = 0.1) -> RPO:
    """Conservative DPO (Mitchell 2023): labels are wrong with probability `epsilon`.

    Equal to the paper's cross-entropy up to the entropy of the label noise, a constant.

    Raises:
        ValueError: if `epsilon` is not in (0, 0.5) or `beta` not positive and finite.
    """
    if not is_number(epsilon) or not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon must lie in (0, 0.5), got {epsilon!r}")
    return RPO("bwd_kl", beta=beta, target_margin=math.log((1 - epsilon) / epsilon))


def IPO(beta: float = 0.1) -> RPO:
    """Identity Preference Optimization (arXiv 2310.12036, eq. 17): `(log-ratio margin - 1 / (2 beta))^2`.

    `beta` is the paper's tau. The squared distance carries a factor 1/2, so implicit rewards are scaled by sqrt(2).

    Raises:
        ValueError: if `beta` is not positive and finite.
    """
    check_positive("beta", beta)
    return RPO("sq", beta=math.sqrt(2), target_margin=math.sqrt(2) / (2 * beta))


def SimPO(beta: float = 2.0, gamma: float = 1.0) -> RPO:
    """Simple Preference Optimization (arXiv 2405.14734, eq. 6): length-normalised, reference-free, with a margin.

    Raises:
        ValueError: if `beta` is not positive and finite, or `gamma` not finite.
    """
    return RPO("bwd_kl", beta=beta, target_margin=math.inf, gamma=gamma, length_normalize=True, reference_free=True)


def DistilledDPO(beta: float = 0.1, eta: float = 1.0) -> RPO:
    """Reward-model distillation (arXiv 2405.19316, eq. 7): `(beta log-ratio margin - eta reward margin)^2`.

    The paper's squared error has no factor 1/2 and neither has this loss, so that its learning rates apply here.
    `RPO("sq")` has that factor (for two responses its loss is half of this), which sqrt(2) in `beta` and `eta`
    cancels: the reported `implicit_rewards` are sqrt(2) times `beta` times the log-ratios.

    Raises:
        ValueError: if `beta` or `eta` is not positive and finite.
    """
    check_positive("beta", beta)
    check_positive("eta", eta)
    return RPO("sq", beta=math.sqrt(2) * beta, eta=math.sqrt(2) * eta)


# By their names on the command line.
PRESETS: dict[str, Callable[..., RPO]] = {
    "rpo": RPO,
    "dpo": DPO,
    "cdpo": CDPO,
    "ipo": IPO,
    "simpo": SimPO,
    "distilled_dpo": DistilledDPO,
}
