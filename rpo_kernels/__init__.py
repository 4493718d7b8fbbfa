"""Fused kernels for Reward-aware Preference Optimization: from logits, or hidden states and LM head, to the loss.

The public names are those of `_api.py`. They are imported, and torch and this package's operators with them, when the
first of them is used, so that `rpo-kernels --help` need not load torch.
"""

from typing import TYPE_CHECKING, Any

from ._lazy import attribute

if TYPE_CHECKING:
    from ._api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    return attribute(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *attribute(__name__, "__all__")})
