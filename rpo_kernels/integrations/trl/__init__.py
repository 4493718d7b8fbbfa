"""TRL: `patch()` makes its trainers compute their loss layer here, `RPOTrainer` trains with RPO on its `DPOTrainer`."""

from typing import TYPE_CHECKING, Any

from .patching import Patch, patch

if TYPE_CHECKING:
    from .trainer import RPOConfig, RPOTrainer

__all__ = ["Patch", "RPOConfig", "RPOTrainer", "patch"]


def __getattr__(name: str) -> Any:
    # They need TRL imported, which takes seconds, and a newer one than `patch` does.
    if name in ("RPOConfig", "RPOTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
