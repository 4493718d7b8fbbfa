"""When the values of tensors, not only their shapes, are checked."""

import os

import torch
from torch import Tensor


def checks_values(x: Tensor) -> bool:
    """Whether to read the values of `x`: always on the CPU, and never while torch.compile traces.

    Reading them from an accelerator makes the host wait for it, so there only if RPO_KERNELS_CHECK=1 is set.
    """
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("RPO_KERNELS_CHECK") == "1"
