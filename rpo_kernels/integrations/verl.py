"""verl: log-probabilities and entropy of its actors and references. Name this module in verl's configuration:

    actor_rollout_ref.model.external_lib=rpo_kernels.integrations.verl

or in the environment, `VERL_USE_EXTERNAL_MODULES=rpo_kernels.integrations.verl`: verl imports it in every worker, which
is enough. With `use_fused_kernels` and `impl_backend: torch` the logits are not materialised.
"""

import sys
from typing import Any

from torch import Tensor

from ..head import linear_token_logprobs
from ..logprobs import token_logprobs
from ._patching import Patch, Replacement

_ON_LOGITS = "verl.utils.torch_functional"
_FUSED = "verl.utils.experimental.torch_functional"


def patch(memory_budget: int | str | None = None, gradient_filter: float | None = None) -> Patch:
    """Replace `FusedLinearForPPO.forward` and `logprobs_from_logits`; results are float32 whatever the model's type.

    Args:
        memory_budget, gradient_filter: as in `linear_token_logprobs`, for the former.

    Returns:
        A handle: `undo()`, or leaving it as a context manager, restores verl's own functions.

    Raises:
        ImportError: if verl is not installed.
        RuntimeError: if this version's functions have other parameters than those known here.
    """

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        outputs: Any = linear_token_logprobs(
            *(hidden_states, vocab_weights, input_ids.long()),
            temperature=temperature,
            memory_budget=memory_budget,
            gradient_filter=gradient_filter,
            outputs=("entropy",),
        )
        return outputs.logps, outputs.entropy

    known = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
    replacements = [
        Replacement(_FUSED, "FusedLinearForPPO.forward", known, forward),
        Replacement(_ON_LOGITS, "logprobs_from_logits", ("logits", "labels", "inplace_backward"), logprobs_from_logits),
    ]
    return Patch("verl", replacements)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of this name: `[..., V]` and `[...]` to `[...]`."""
    return token_logprobs(logits, labels.long(), inplace_backward=inplace_backward)


if "verl" in sys.modules:  # verl is what imports this
    patch()
