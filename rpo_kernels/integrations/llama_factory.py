"""LLaMA-Factory: log-probabilities of its DPO, ORPO, SimPO and KTO trainers. In place of `llamafactory-cli train`:

python -m rpo_kernels.integrations.llama_factory llamafactory.launcher config.yaml
torchrun --nproc-per-node 8 -m rpo_kernels.integrations.llama_factory llamafactory.launcher config.yaml
"""

import torch
from torch import Tensor

from ..logprobs import token_logprobs
from ._patching import Patch, Replacement, run_patched


def patch(inplace_backward: bool = True) -> Patch:
    """Replace `get_batch_logps` wherever LLaMA-Factory has imported it.

    Args:
        inplace_backward: the gradient overwrites the logits, which LLaMA-Factory has copied to float32. If a model
            reads them in backward, autograd raises an error; then set False.

    Returns:
        A handle: `undo()`, or leaving it as a context manager, restores LLaMA-Factory's own function.

    Raises:
        ImportError: if LLaMA-Factory is not installed.
        RuntimeError: if this version's function has other parameters than those known here.
    """

    def get_batch_logps(
        logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums of each response `[B]` and their numbers of scored tokens; labels stand beside the input ids."""
        logps = token_logprobs(
            logits, labels, ignore_index=label_pad_token_id, shift=True, inplace_backward=inplace_backward
        )
        scored = labels != label_pad_token_id
        scored[:, :1] = False
        lengths = scored.sum(-1)
        if ld_alpha is not None:
            logps = logps * _length_desensitised(scored, lengths, ld_alpha)
        return logps.sum(-1), lengths

    known = ("logits", "labels", "label_pad_token_id", "ld_alpha")
    module = "llamafactory.train.trainer_utils"
    return Patch("llamafactory", [Replacement(module, "get_batch_logps", known, get_batch_logps)])


def _length_desensitised(scored: Tensor, lengths: Tensor, ld_alpha: float) -> Tensor:
    """Weights `[B, T]`: 1 up to the length of the pair's shorter response, counted from the first scored token, and
    `ld_alpha` after it (LD-DPO, arXiv 2409.06411); the chosen responses stand above the rejected ones."""
    chosen, rejected = lengths.chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    end = scored.int().argmax(-1) + shared
    positions = torch.arange(scored.shape[1], device=scored.device)
    return torch.where(positions < end[:, None], 1.0, ld_alpha)


if __name__ == "__main__":
    run_patched(patch, "rpo_kernels.integrations.llama_factory")
