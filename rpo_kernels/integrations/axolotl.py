"""axolotl: a plugin that patches the TRL trainers it uses. In the configuration:

plugins:
  - rpo_kernels.integrations.axolotl.RPOKernelsPlugin
"""

import sys
from typing import Any

from .trl import patch

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError("rpo_kernels.integrations.axolotl needs axolotl: pip install axolotl") from error

_UTILS = "trl.trainer.utils"
_FUNCTIONS = ("selective_log_softmax", "entropy_from_logits")  # that axolotl replaces too


class RPOKernelsArgs(BaseModel):
    """Settings that the plugin adds to axolotl's configuration: arguments of `rpo_kernels.integrations.trl.patch`."""

    rpo_kernels_memory_budget: int | str | None = None
    rpo_kernels_gradient_filter: float | None = None


class RPOKernelsPlugin(BasePlugin):
    """`rpo_kernels.integrations.trl.patch` for runs with `rl:` in their configuration."""

    def __init__(self) -> None:
        super().__init__()
        self._functions: dict[str, Any] = {}

    def get_input_args(self) -> str:
        """Where axolotl finds the settings."""
        return f"{__name__}.RPOKernelsArgs"

    def register(self, cfg: Any) -> None:
        """Patch TRL while its modules still hold its own functions."""
        if cfg.get("rl"):
            patch(cfg.get("rpo_kernels_memory_budget"), cfg.get("rpo_kernels_gradient_filter"))
            self._functions = {name: getattr(sys.modules[_UTILS], name) for name in _FUNCTIONS}

    def pre_model_load(self, cfg: Any) -> None:
        """Replace axolotl's own replacements of the same functions, which exist by now."""
        for name, ours in self._functions.items():
            theirs = getattr(sys.modules[_UTILS], name)
            for module in [m for key, m in list(sys.modules.items()) if key == "trl" or key.startswith("trl.")]:
                if vars(module).get(name) is theirs:
                    setattr(module, name, ours)
