"""The loss of a model on a batch: the only file of the trainer that calls this package's operators."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .. import RPOOutput, linear_rpo_loss, linear_token_logprobs, rpo_loss, token_logprobs
from ..integrations.model_head import ModelHead, check_head, find_head
from ..objectives import Objective
from ..sequences import Segments
from ..shared_prompts import attention_mask
from .models import base_model

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LossLayer:
    """How the loss is computed: from the model's logits, or from its hidden states and LM head, without the logits.

    `memory_budget` and `gradient_filter` are those of `linear_token_logprobs`, for the loss from hidden states.
    """

    source: Literal["head", "logits"] = "logits"
    memory_budget: int | str | None = None
    gradient_filter: float | None = None

    @classmethod
    def of(cls, model: nn.Module, source: str = "auto", **options: Any) -> "LossLayer":
        """The loss layer for a model: with `"auto"`, from hidden states where the model allows it.

        Raises:
            ValueError: if `source` is `"head"` and the model does not allow it.
        """
        if source != "logits":
            try:
                check_head(model)
            except (ValueError, RuntimeError) as error:  # hidden states of another type than the head's, for one
                if source == "head":
                    raise ValueError(
                        f"the loss cannot be computed from hidden states of this model: {error}"
                    ) from error
                logger.warning(f"{error}; the loss is computed from the logits")
                source = "logits"
        return cls("logits" if source == "logits" else "head", **options)


def preference_loss(model: nn.Module, batch: dict, objective: Objective, layer: LossLayer = LossLayer()) -> RPOOutput:
    """The objective on a batch of `GroupCollator` or `SharedPromptCollator`, differentiable in the parameters."""
    sizes = batch["group_sizes"]
    ragged = len(set(sizes)) > 1
    groups: dict[str, Any] = dict(
        ref_logps=None if getattr(objective, "reference_free", False) else batch["ref_logps"],
        objective=objective,
        num_responses=sizes[0],
        group_ids=[g for g, size in enumerate(sizes) for _ in range(size)] if ragged else None,
        cu_seqlens=batch.get("cu_seqlens"),
    )
    if layer.source == "logits":
        logits, labels, places = _logits(model, batch)
        return rpo_loss(logits, labels, batch["rewards"], inplace_backward=True, **places, **groups)

    def loss(head: ModelHead, hidden: Tensor) -> RPOOutput:
        return linear_rpo_loss(
            hidden,
            labels=batch["labels"],
            rewards=batch["rewards"],
            memory_budget=layer.memory_budget,
            gradient_filter=layer.gradient_filter,
            **head.arguments,
            **_places(batch),
            **groups,
        )

    return _at_head(model, batch, loss)


@torch.no_grad()
def response_logps(model: nn.Module, batch: dict, layer: LossLayer = LossLayer()) -> Tensor:
    """Log-probability of each response of a batch, `[B]` float32: as needed from a reference model."""
    segments = Segments(len(batch["rewards"]), batch.get("cu_seqlens"))
    if layer.source == "logits":
        logits, labels, places = _logits(model, batch)
        return segments.sum(token_logprobs(logits, labels, **places))

    def logps(head: ModelHead, hidden: Tensor) -> Tensor:
        token_logps = linear_token_logprobs(
            hidden,
            labels=batch["labels"],
            memory_budget=layer.memory_budget,
            **head.arguments,
            **_places(batch),
        )
        return segments.sum(token_logps)

    return _at_head(model, batch, logps)


def _at_head(model: nn.Module, batch: dict, use: Callable[[ModelHead, Tensor], Any]) -> Any:
    """The result of `use(head, hidden states)`, called inside the forward of the model and its wrappers.

    DDP and FSDP prepare backward and gather weights around `forward`, so the backbone may not be called past them.
    """
    inner = getattr(model, "module", model)
    own = inner.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def forward(**inputs: Tensor) -> Any:
        restore()
        head = find_head(inner)
        hidden = head.backbone(**inputs, use_cache=False).last_hidden_state
        return use(head, hidden[0] if _is_shared(batch) else hidden)

    inner.forward = forward
    try:
        return model(**_model_inputs(model, batch))
    finally:
        restore()


def _logits(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, their labels, and which predicts which; only the logits that predict one, where the model can do so.

    Models apply their own softcap and logit scale, so these logits are final.
    """
    keep = {}
    if takes_logits_to_keep(model):
        keep["logits_to_keep"] = batch["label_rows"] if _is_shared(batch) else batch["logits_to_keep"]
    logits = model(**_model_inputs(model, batch), use_cache=False, **keep).logits
    if _is_shared(batch):
        return logits[0], batch["labels"], {} if keep else _places(batch)
    return logits, batch["labels"][:, -logits.shape[1] :], _places(batch)


def _is_shared(batch: dict) -> bool:
    return "visible_until" in batch


def _model_inputs(model: nn.Module, batch: dict) -> dict[str, Any]:
    inputs = {"input_ids": batch["input_ids"]}
    if _is_shared(batch):
        return inputs | {"position_ids": batch["position_ids"], "attention_mask": attention_mask(model, batch)}
    return inputs | {"attention_mask": batch["attention_mask"]}


def _places(batch: dict) -> dict[str, Any]:
    """Which of the model's positions predicts each label, as an argument of the package's operators."""
    return {"rows": batch["label_rows"]} if _is_shared(batch) else {"shift": True}


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model under its wrappers (DDP, PEFT) can compute the logits of the last positions only."""
    return "logits_to_keep" in inspect.signature(base_model(getattr(model, "module", model)).forward).parameters
