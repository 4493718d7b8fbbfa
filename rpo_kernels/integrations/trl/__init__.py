"""TRL: `patch()` makes its trainers compute their loss layer here, `RPOTrainer` trains with RPO on its `DPOTrainer`."""

from typing import TYPE_CHECKING, Any

from .patching import Patch, patch

if TYPE_CHECKING:
    from .trainer import RPOConfig, RPOTrainer

__all__ = ["Patch", "RPOConfig", "RPOTrainer", "patch"]


def __getattr__(name: str) -> Any:
    # Imported on first use: they import TRL, which takes seconds, and need a newer version than `patch`.
    if name in ("RPOConfig", "RPOTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
