"""The token level in Triton, for CUDA and ROCm devices; under TRITON_INTERPRET=1 also for the CPU."""

from .grad import row_grad
from .stats import row_stats

__all__ = ["row_grad", "row_stats"]
