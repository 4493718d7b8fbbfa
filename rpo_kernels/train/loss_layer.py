"""From a model and a batch to the loss: the one place where the trainer meets the package's operators."""

import inspect

import torch
from torch import Tensor, nn

from .. import RPOOutput, rpo_loss, token_logprobs
from ..objectives import Objective
from .models import base_model


def preference_loss(model: nn.Module, batch: dict, objective: Objective) -> RPOOutput:
    """The objective on a batch of `GroupCollator`, differentiable in the model's parameters."""
    logits, labels = _logits(model, batch)
    sizes = batch["group_sizes"]
    ragged = len(set(sizes)) > 1
    return rpo_loss(
        logits,
        labels,
        batch["rewards"],
        ref_logps=None if getattr(objective, "reference_free", False) else batch["ref_logps"],
        objective=objective,
        num_responses=sizes[0],
        group_ids=[g for g, size in enumerate(sizes) for _ in range(size)] if ragged else None,
        shift=True,
        inplace_backward=True,
    )


@torch.no_grad()
def response_logps(model: nn.Module, batch: dict) -> Tensor:
    """Log-probability of each response of a batch, `[B]` float32: what a reference model is asked for."""
    logits, labels = _logits(model, batch)
    return token_logprobs(logits, labels, shift=True).sum(-1)


def _logits(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Logits and labels of the positions from the end of the shortest prompt on, where the model can leave out others.

    Models apply their own softcap and logit scale, so these logits are final.
    """
    takes_keep = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
    keep = {"logits_to_keep": batch["logits_to_keep"]} if takes_keep else {}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **keep).logits
    return logits, batch["labels"][:, -logits.shape[1] :]
