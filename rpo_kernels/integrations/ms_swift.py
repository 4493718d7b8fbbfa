"""ms-swift: log-probabilities of its DPO, KTO, CPO and ORPO trainers. Write a file of two lines and name it:

import rpo_kernels.integrations.ms_swift
rpo_kernels.integrations.ms_swift.patch()

swift rlhf --rlhf_type dpo --external_plugins plugin.py ...
"""

import importlib.util
from typing import Any

from torch import Tensor

from ..logprobs import token_logprobs
from ._patching import Patch, Replacement

# Of version 4 and of version 3.
_MODULES = ("swift.rlhf_trainers.rlhf_mixin", "swift.trainers.rlhf_trainer.rlhf_mixin")


def patch() -> Patch:
    """Replace `RLHFTrainerMixin.get_per_token_logps`; with sequence parallelism ms-swift's own is called.

    Returns:
        A handle: `undo()`, or leaving it as a context manager, restores ms-swift's own method.

    Raises:
        ImportError: if ms-swift is not installed.
        RuntimeError: if this version's method has other parameters than those known here.
    """
    module = _module()

    def get_per_token_logps(
        self: Any, logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, mean or sum of the logits, and which tokens are scored, `[B, T]` each."""
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Invalid reduction: {reduction}")
        if self.template.sequence_parallel_size != 1:
            return own(self, logits, labels, label_pad_token_id, reduction)
        labels = labels.to(logits.device)
        outputs: Any = token_logprobs(logits, labels, ignore_index=label_pad_token_id, outputs=("mean_logit",))
        reduced = outputs.mean_logit * (1 if reduction == "mean" else logits.shape[-1])
        return outputs.logps, reduced, labels != label_pad_token_id

    known = ("self", "logits", "labels", "label_pad_token_id", "reduction")
    name = "RLHFTrainerMixin.get_per_token_logps"
    handle = Patch("swift", [Replacement(module, name, known, get_per_token_logps)])
    own = handle.own(name)
    return handle


def _module() -> str:
    for module in _MODULES:
        try:
            if importlib.util.find_spec(module) is not None:
                return module
        except ModuleNotFoundError:  # its package is not there
            continue
    raise ImportError("rpo_kernels.integrations.ms_swift needs ms-swift: pip install ms-swift")
