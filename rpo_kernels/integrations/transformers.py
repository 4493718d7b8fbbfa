"""transformers' `Trainer`: the preference loss as its `compute_loss_func`, from hidden states, without the logits.

loss = PreferenceLoss(model, RPO(beta=0.1))
trainer = Trainer(model, args, data_collator=loss.collate(my_collator), compute_loss_func=loss, ...)
"""

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import linear_rpo_loss
from ..objectives import RPO, Objective
from .model_head import find_head

try:
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError("rpo_kernels.integrations.transformers needs transformers: pip install transformers") from error

# Entries of a batch beside the model's inputs.
_PREFERENCE = ("labels", "rewards", "ref_logps", "group_sizes")


@dataclass
class PreferenceOutput(ModelOutput):
    """What the model returns for a batch of preferences: fields of `RPOOutput`, all of them set."""

    loss: Tensor = None  # type: ignore[assignment]  # scalar: mean of group_losses
    group_losses: Tensor = None  # type: ignore[assignment]  # [G]
    logps: Tensor | None = None  # [B]
    implicit_rewards: Tensor | None = None  # [B]
    accuracy: Tensor | None = None  # scalar
    margin: Tensor | None = None  # scalar


class PreferenceLoss:
    """A preference loss for transformers' `Trainer`, computed inside the model's forward.

    The model's forward gets one more argument, through which `collate` passes the loss's inputs; without it, as in
    `generate`, it is unchanged. Wrap a model (PEFT, DDP) after this, and set `remove_unused_columns=False`.

    The loss is the mean over all groups of an optimizer step, however they are split into micro-batches and
    processes: what `Trainer` calls items are groups here.

    Args:
        model: a causal language model; PEFT models too.
        objective: `RPO(...)`, a preset or any callable that `linear_rpo_loss` takes.
        memory_budget, gradient_filter: as in `linear_token_logprobs`.

    Raises:
        ValueError: if `find_head` does not support the model's head.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective = RPO(),
        *,
        memory_budget: int | str | None = None,
        gradient_filter: float | None = None,
    ):
        find_head(model)
        self.objective = objective
        self.options: dict[str, Any] = dict(memory_budget=memory_budget, gradient_filter=gradient_filter)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        own = base.forward

        # Its own signature stays: `generate` checks arguments against it.
        @functools.wraps(own)
        def forward(_: nn.Module, *args: Any, preference: Mapping | None = None, **kwargs: Any) -> Any:
            if preference is None:
                return own(*args, **kwargs)
            kwargs.pop("shift_labels", None)  # its size is the number of groups
            return self._from_hidden_states(model, preference, **kwargs)

        base.forward = types.MethodType(forward, base)  # type: ignore[method-assign]

    def collate(self, collator: Callable[[list], dict]) -> Callable[[list], dict]:
        """A collator that packs what another one gives for the loss.

        The other one gives, beside the model's inputs, `labels` `[B, T]` beside input_ids with -100 where not scored,
        `rewards` `[B]`, `ref_logps` `[B]` unless the objective is reference-free, and, unless all groups have two
        responses, `group_sizes`, a list; the responses of a group stand one below the other.
        `rpo_kernels.train.GroupCollator` does.
        """

        def collate(examples: list) -> dict:
            batch = collator(examples)
            missing = [name for name in ("input_ids", "labels", "rewards") if name not in batch]
            if missing:
                raise ValueError(f"the collator must give {missing}; it gives {sorted(batch)}")
            preference = {name: batch[name] for name in _PREFERENCE if name in batch}
            preference.setdefault("group_sizes", [2] * (len(batch["rewards"]) // 2))
            # Trainer counts the entries of these that are not -100 and calls them the items of a batch.
            groups = torch.zeros(len(preference["group_sizes"]), dtype=torch.int64)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
            return {**inputs, "preference": preference, "labels": groups, "shift_labels": groups}

        return collate

    def __call__(self, outputs: Any, labels: Any = None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The micro-batch's share of the mean over `num_items_in_batch` groups; its own mean where that is None."""
        if type(outputs) is not PreferenceOutput:
            raise ValueError(
                f"outputs must be a PreferenceOutput, got {type(outputs).__name__}: batches must come from a collator "
                "that PreferenceLoss.collate makes"
            )
        if num_items_in_batch is None:
            return outputs.loss
        return outputs.group_losses.sum() / num_items_in_batch

    def _from_hidden_states(self, model: nn.Module, preference: Mapping, **inputs: Any) -> PreferenceOutput:
        head = find_head(model)
        hidden = head.backbone(**inputs, use_cache=False).last_hidden_state
        sizes = preference["group_sizes"]
        reference_free = getattr(self.objective, "reference_free", False)
        output = linear_rpo_loss(
            hidden,
            labels=preference["labels"],
            rewards=preference["rewards"],
            ref_logps=None if reference_free else preference.get("ref_logps"),
            objective=self.objective,
            group_ids=[group for group, size in enumerate(sizes) for _ in range(size)],
            shift=True,
            **self.options,
            **head.arguments,
        )
        return PreferenceOutput(**{name: getattr(output, name) for name in PreferenceOutput.__dataclass_fields__})
