"""OpenRLHF: log-probabilities and entropy of its actors. Put this module before the one that OpenRLHF's commands run:

deepspeed --module rpo_kernels.integrations.openrlhf openrlhf.cli.train_dpo --pretrain ...
"""

import torch
from torch import Tensor

from ..logprobs import token_logprobs
from ._patching import Patch, Replacement, run_patched

_UTILS = "openrlhf.models.utils"


def patch() -> Patch:
    """Replace `log_probs_from_logits` and `compute_entropy` for every model of this process.

    Returns:
        A handle: `undo()`, or leaving it as a context manager, restores OpenRLHF's own functions.

    Raises:
        ImportError: if OpenRLHF is not installed.
        RuntimeError: if this version's functions have other parameters than those known here.
    """
    replacements = [
        Replacement(_UTILS, "log_probs_from_logits", ("logits", "labels", "temperature"), log_probs_from_logits),
        Replacement(_UTILS, "compute_entropy", ("logits",), compute_entropy),
    ]
    return Patch("openrlhf", replacements)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's function of this name: `[..., V]` and `[...]` to `[...]`, float32. It does not scale the logits."""
    return token_logprobs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """OpenRLHF's function of this name: `[..., V]` to `[...]`, float32."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, labels, outputs=("entropy",)).entropy  # type: ignore[attr-defined]


if __name__ == "__main__":
    run_patched(patch, "rpo_kernels.integrations.openrlhf")
