"""Outputs of the token level beside log-probabilities, by name, and their form as results of the operators."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.interface import OUTPUT_FIELDS, RowStats


class TokenOutputs(NamedTuple):
    """What `outputs=` requested, None where not: of the labels' shape, float32 (float64 for float64 inputs), 0 where
    not scored. `logps` and `entropy` are differentiable."""

    logps: Tensor  # natural log-probability of the label
    entropy: Tensor | None = None  # of the distribution over the vocabulary, in nats
    mean_logit: Tensor | None = None  # mean over the vocabulary of the transformed logits
    is_top1: Tensor | None = None  # 1 where the label's logit is the largest, the first of equal ones, else 0
    log_sum_sq_probs: Tensor | None = None  # log of the sum of squared probabilities
    dropped: Tensor | None = (
        None  # upper bound of the gradient mass that a filter leaves out, see `linear_token_logprobs`
    )


class RequestedOutputs(NamedTuple):
    """The outputs requested: those of a row's statistics, in a fixed order, and whether `dropped` is among them."""

    statistics: tuple[str, ...]
    dropped: bool

    @classmethod
    def check(cls, outputs: Sequence[str]) -> "RequestedOutputs":
        """From the argument `outputs`.

        Raises:
            ValueError: if it is not a sequence of names of `TokenOutputs`, other than `logps`.
        """
        if outputs == ():
            return _NOTHING
        names = TokenOutputs._fields[1:]
        if isinstance(outputs, str) or not set(outputs) <= set(names):
            raise ValueError(f"outputs must be a tuple of names among {names}, got {outputs!r}")
        return cls(tuple(name for name in OUTPUT_FIELDS if name in outputs), "dropped" in outputs)

    def unpack(self, logps: Tensor, entropy: Tensor, others: Tensor, dropped: Tensor | None) -> TokenOutputs:
        """From an operator's results, the latter three in any shape, as `TokenOutputs` of the shape of `logps`."""
        names = [name for name in self.statistics if name != "entropy"]
        fields = {name: value.view(logps.shape) for name, value in zip(names, others, strict=True)}
        if "entropy" in self.statistics:
            fields["entropy"] = entropy.view(logps.shape)
        if self.dropped:
            fields["dropped"] = torch.zeros_like(logps) if dropped is None else dropped.view(logps.shape)
        return TokenOutputs(logps, **fields)


_NOTHING = RequestedOutputs((), False)


def pack(stats: RowStats, outputs: Sequence[str], vocab: int) -> tuple[Tensor, Tensor]:
    """Entropy of the rows' shape, or empty, and the other outputs one after the other."""
    entropy = stats.output("entropy", vocab) if "entropy" in outputs else stats.logp.new_empty(0)
    others = [stats.output(name, vocab) for name in outputs if name != "entropy"]
    return entropy, torch.stack(others) if others else stats.logp.new_empty(0)


def pack_empty(logps: Tensor, outputs: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors as `pack` makes them, for results of the shape of `logps`."""
    others = len(outputs) - ("entropy" in outputs)
    entropy = torch.empty_like(logps) if "entropy" in outputs else logps.new_empty(0)
    return entropy, logps.new_empty(others, *logps.shape) if others else logps.new_empty(0)
