"""Liger-Kernel's fused linear losses with this package's head: change the import, keep the rest.

    from rpo_kernels.integrations.liger import LigerFusedLinearDPOLoss      # was: from liger_kernel.chunked_loss

Classes, arguments, loss types and results are Liger's; only the log-probabilities are computed by
`linear_token_logprobs`. `compiled` and `chunk_size` are accepted and ignored; `memory_budget` replaces them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..head import linear_token_logprobs

try:
    from liger_kernel import chunked_loss as liger
    from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction
except ImportError as error:
    raise ImportError("rpo_kernels.integrations.liger needs Liger-Kernel: pip install liger-kernel") from error

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


class _Head:
    """Two more settings for each class, and the head that they share.

    Args:
        memory_budget, gradient_filter: as in `linear_token_logprobs`; the other arguments are Liger's.
    """

    def __init__(
        self, *args: Any, memory_budget: int | str | None = None, gradient_filter: float | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.memory_budget, self.gradient_filter = memory_budget, gradient_filter

    def _token_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        """`[B, T]`, 0 where the label is `ignore_index`."""
        return linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            temperature=getattr(self, "temperature", 1.0),
            ignore_index=getattr(self, "ignore_index", -100),
            memory_budget=self.memory_budget,
            gradient_filter=self.gradient_filter,
        )

    def _response_logps(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        """`[B]` sums, or means if the loss is of those."""
        return self._reduced(self._token_logps(hidden, weight, labels, bias), labels)

    def _reduced(self, token_logps: Tensor, labels: Tensor) -> Tensor:
        # Liger's SimPO and ORPO always take means and have no such attribute.
        if not getattr(self, "average_log_prob", True):
            return token_logps.sum(-1)
        return token_logps.sum(-1) / (labels != self.ignore_index).sum(-1)  # type: ignore[attr-defined]

    def _settings_of(self, loss: Callable) -> dict[str, Any]:
        """Those parameters of a loss function that are attributes here."""
        return {name: getattr(self, name) for name in inspect.signature(loss).parameters if hasattr(self, name)}


class _Paired(_Head):
    """Losses of chosen responses above rejected ones."""

    def _loss(
        self,
        loss: Callable,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        reference: tuple[Tensor, Tensor, Tensor | None] | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        pairs = len(target) // 2
        token_logps = self._token_logps(hidden, weight, target, bias)
        chosen, rejected = self._reduced(token_logps, target).split(pairs)
        options = self._settings_of(loss)
        if reference is not None:
            ref_hidden, ref_weight, ref_bias = reference
            with torch.no_grad():
                ref_logps = self._response_logps(ref_hidden, ref_weight, target, ref_bias)
            options["ref_chosen_logps"], options["ref_rejected_logps"] = ref_logps.split(pairs)
        value, *rest = loss(chosen, rejected, target, **options)

        nll = token_logps.new_zeros(())
        if self.compute_nll_loss:  # type: ignore[attr-defined]
            labels = (target if nll_target is None else nll_target)[:pairs]
            if nll_target is None:
                logps = token_logps[:pairs]
            else:
                logps = self._token_logps(hidden[:pairs], weight, labels, bias)
            nll = -logps.sum() / (labels != self.ignore_index).sum()  # type: ignore[attr-defined]
        means = _mean_logits(hidden, weight, bias)
        return value + getattr(self, "alpha", 1.0) * nll, _detached(
            chosen, rejected, means[:pairs].mean(), means[pairs:].mean(), nll, *rest
        )


class LigerFusedLinearDPOLoss(_Paired, liger.LigerFusedLinearDPOLoss):
    """`liger_kernel.chunked_loss.LigerFusedLinearDPOLoss`."""

    def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):  # type: ignore[no-untyped-def]
        """As Liger's: hidden states `[2B, T, H]`, chosen above rejected, and labels `[2B, T]` that align with them."""
        reference = (ref_input, ref_weight, ref_bias) if self.use_ref_model else None
        loss = LigerFusedLinearDPOFunction.preference_loss_fn
        return self._loss(loss, lin_weight, _input, target, bias, reference)


class LigerFusedLinearSimPOLoss(_Paired, liger.LigerFusedLinearSimPOLoss):
    """`liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss`."""

    def forward(self, lin_weight, _input, target, bias=None):  # type: ignore[no-untyped-def]
        """As Liger's."""
        return self._loss(LigerFusedLinearSimPOFunction.preference_loss_fn, lin_weight, _input, target, bias)


class LigerFusedLinearCPOLoss(_Paired, liger.LigerFusedLinearCPOLoss):
    """`liger_kernel.chunked_loss.LigerFusedLinearCPOLoss`."""

    def forward(self, lin_weight, _input, target, bias=None):  # type: ignore[no-untyped-def]
        """As Liger's."""
        return self._loss(LigerFusedLinearCPOFunction.preference_loss_fn, lin_weight, _input, target, bias)


class LigerFusedLinearORPOLoss(_Paired, liger.LigerFusedLinearORPOLoss):
    """`liger_kernel.chunked_loss.LigerFusedLinearORPOLoss`."""

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None):  # type: ignore[no-untyped-def]
        """As Liger's."""
        loss = LigerFusedLinearORPOFunction.preference_loss_fn
        return self._loss(loss, lin_weight, _input, target, bias, nll_target=nll_target)


class LigerFusedLinearKTOLoss(_Head, liger.LigerFusedLinearKTOLoss):
    """`liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        _input,
        lin_weight,
        target,
        bias=None,
        preference_labels=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        kl=None,
    ):
        """As Liger's: responses `[B, T, H]`, each good or not by `preference_labels` `[B]` bool."""
        if preference_labels is None:
            raise ValueError("preference_labels must be given, a bool for each response")
        logps = self._response_logps(_input, lin_weight, target, bias)
        ref_logps = None
        if self.use_ref_model:
            with torch.no_grad():
                ref_logps = self._response_logps(ref_input, ref_weight, target, ref_bias)
        loss, *rest = LigerFusedLinearKTOFunction.preference_loss_fn(
            logps, preference_labels, target, ref_log_prob_chunk=ref_logps, beta=self.beta, kl=kl
        )
        logits = _mean_logits(_input, lin_weight, bias).sum(-1) * len(lin_weight)
        good, bad = preference_labels, ~preference_labels
        sums = [(figure * which).sum() for figure in (logps, logits) for which in (good, bad)]
        return loss, _detached(*sums, *rest)


class LigerFusedLinearGRPOLoss(_Head, liger.LigerFusedLinearGRPOLoss):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        """As Liger's; tokens that `attention_mask` leaves out are not computed."""
        # Liger's LUSPO sums over the tokens left out too.
        scored = attention_mask != 0 if self.loss_type != "luspo" else torch.ones_like(attention_mask, dtype=torch.bool)
        labels = torch.where(scored, selected_token_ids, -100)

        def masked(logps: Tensor | None) -> Tensor | None:
            """Ratios of tokens left out are 1, so that none overflows before it is multiplied by 0."""
            return None if logps is None else torch.where(scored, logps.float(), 0)

        if self.use_ref_model and ref_per_token_logps is None:
            with torch.no_grad():
                ref_per_token_logps = self._token_logps(ref_input, ref_weight, labels, ref_bias)
        loss_fn = LigerFusedLinearGRPOFunction.ppo_loss_fn
        loss, metrics = loss_fn(
            per_token_logps=self._token_logps(_input, lin_weight, labels, bias),
            attention_mask=attention_mask,
            advantages=advantages,
            full_attention_mask=attention_mask,
            ref_per_token_logps=masked(ref_per_token_logps) if self.use_ref_model else None,
            old_per_token_logps=masked(old_per_token_logps),
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **self._settings_of(loss_fn),
        )
        return loss, _detached(*metrics)


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean over the vocabulary of the logits at each position, `[B, T]`: one product with the mean row of the head."""
    mean = hidden.float() @ weight.float().mean(0)
    return mean if bias is None else mean + bias.float().mean()


def _detached(*figures: Tensor) -> tuple[Tensor, ...]:
    return tuple(figure.detach() for figure in figures)
