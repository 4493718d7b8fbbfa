"""From the groups of a device's batch to micro-batches: prompts shared or sequences padded, within a token budget."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..shared_prompts import SharedPromptCollator, check_shared_prompts, pack_by_tokens
from ..shared_prompts.tree import tree_size
from .collator import GroupCollator
from .dataset import Example
from .loss_layer import LossLayer, response_logps
from .models import base_model

logger = logging.get_logger(__name__)
_DENSE_TOKENS = 4096
# Tolerated relative difference of a response's log-probability between the two forms.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class BatchForm:
    """Collates a device's groups into micro-batches.

    A call gives `micro_batches`, each one of `SharedPromptCollator` or `GroupCollator`, with `truncated_tokens` and
    `groups`, the places of its groups in the list that was given, in rising order. Beside them stand the tokens that
    are computed, `computed_tokens`, those of them that are not padding, `real_tokens`, and those that separate padded
    sequences would take, `padded_tokens`.

    Args:
        shared: whether each prompt is computed once for its responses.
        max_tokens: tokens of a micro-batch, padding included; a larger group is one of its own. None: one micro-batch.
        pad_token_id: pads sequences.
        dense: whether attention computes a mask of a row's tokens by its tokens, so that long rows of shared prompts
            do not pay: without `max_tokens` they then hold at most 4,096 tokens, or one group.
    """

    shared: bool = False
    max_tokens: int | None = None
    pad_token_id: int = 0
    dense: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        shared_prompts: str = "auto",
        max_tokens: int | None = None,
        pad_token_id: int = 0,
        examples: Iterable[Example] = (),
        longest: int | None = None,
        loss_layer: LossLayer | None = None,
    ) -> "BatchForm":
        """The form for a model: with `"auto"`, shared prompts where they are exact, else a line with the reason.

        Args:
            model: on its device, not yet wrapped for several.
            shared_prompts: `"auto"`, `"on"` or `"off"`.
            examples: the training data, iterated over more than once; its first two groups are computed both ways and
                compared.
            longest: tokens of the longest sequence of the data, where that is known.
            loss_layer: how the comparison computes log-probabilities.

        Raises:
            ValueError: if `shared_prompts` is `"on"` and they are not exact, or an argument is out of range.
        """
        if shared_prompts not in ("auto", "on", "off"):
            raise ValueError(f"shared_prompts must be 'auto', 'on' or 'off', got {shared_prompts!r}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        longest = longest or max(map(_longest, examples), default=None)
        first = list(islice(examples, 2))
        form = cls._exact(model, shared_prompts, cls(False, max_tokens, pad_token_id), first, longest, loss_layer)
        form._name_larger(examples)
        return form

    @classmethod
    def _exact(
        cls,
        model: nn.Module,
        shared_prompts: str,
        padded: "BatchForm",
        first: Sequence[Example],
        longest: int | None,
        loss_layer: LossLayer | None,
    ) -> "BatchForm":
        if shared_prompts == "off":
            return padded
        try:
            check_shared_prompts(model, longest)
            config = base_model(model).config
            shared = replace(padded, shared=True, dense=config._attn_implementation != "flex_attention")
            if first:
                shared._compare(padded, model, first, loss_layer or LossLayer.of(model))
        except ValueError as error:
            if shared_prompts == "on":
                raise
            logger.warning(f"{error}; each response is computed with its own prompt, padded")
            return padded
        return shared

    def _name_larger(self, examples: Iterable[Example]) -> None:
        """Warn of groups above `max_tokens`, which are micro-batches of their own."""
        if self.max_tokens is None:
            return
        sizes = [self.tokens(example) for example in examples]
        larger = [group for group, size in enumerate(sizes) if size > self.max_tokens]
        for group in larger[:3]:
            logger.warning(
                f"group {group + 1} of {len(sizes)} takes {sizes[group]} tokens, more than max_tokens="
                f"{self.max_tokens}: it is a micro-batch of its own"
            )
        if len(larger) > 3:
            logger.warning(f"so are {len(larger) - 3} more, the largest of {max(sizes)} tokens")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        micro_batches = [self._micro_batch(examples, row) for row in self._rows(examples, self.shared)]
        padded_rows = self._rows(examples, False)
        return {
            "micro_batches": micro_batches,
            "real_tokens": sum(self._real_tokens(example) for example in examples),
            "computed_tokens": sum(part["input_ids"].numel() for part in micro_batches),
            "padded_tokens": sum(_padded_tokens([examples[g] for g in row]) for row in padded_rows),
        }

    def tokens(self, example: Example) -> int:
        """Tokens that a group takes in a micro-batch of its own, padding included."""
        return tree_size(example.prompt, example.responses) if self.shared else _padded_tokens([example])

    def _real_tokens(self, example: Example) -> int:
        if self.shared:
            return self.tokens(example)
        return sum(len(example.prompt) + len(response) for response in example.responses)

    def _rows(self, examples: Sequence[Example], shared: bool) -> list[list[int]]:
        limit = self.max_tokens or (_DENSE_TOKENS if shared and self.dense else None)
        if limit is None:
            return [list(range(len(examples)))]
        if shared:
            return pack_by_tokens([self.tokens(example) for example in examples], limit)
        return _pack_padded(examples, limit)

    def _micro_batch(self, examples: Sequence[Example], row: list[int]) -> dict[str, Any]:
        members = [examples[g] for g in row]
        # If every response is one token, the loss cannot tell packed sums from packed tokens: use padding.
        single = all(len(response) == 1 for e in members for response in e.responses)
        collate: Callable = SharedPromptCollator() if self.shared and not single else GroupCollator(self.pad_token_id)
        return collate(members) | {"groups": row, "truncated_tokens": [e.truncated_tokens for e in members]}

    def _compare(self, other: "BatchForm", model: nn.Module, examples: Sequence[Example], layer: LossLayer) -> None:
        training = model.training
        model.eval()
        try:
            own, others = (torch.cat(response_logps_by_group(model, form(examples), layer)) for form in (self, other))
        finally:
            model.train(training)
        difference = ((own - others).abs() / others.abs().clamp(min=1)).max().item()
        tolerance = _TOLERANCE[next(model.parameters()).dtype]
        if not difference <= tolerance:
            raise ValueError(
                f"{type(model).__name__} does not compute the same with shared prompts: on the first micro-batch the "
                f"responses' log-probabilities differ by up to {difference:.1e} of their size (at most {tolerance:.0e})"
            )


def response_logps_by_group(model: nn.Module, batch: dict[str, Any], layer: LossLayer) -> list[Tensor]:
    """Log-probabilities of the responses of each group of a `BatchForm`'s batch, on the CPU, in the groups' order."""
    device = next(model.parameters()).device
    by_group: dict[int, Tensor] = {}
    for micro_batch in batch["micro_batches"]:
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in micro_batch.items()}
        logps = response_logps(model, inputs, layer).cpu().split(inputs["group_sizes"])
        by_group.update(zip(inputs["groups"], logps, strict=True))
    return [by_group[group] for group in sorted(by_group)]


def _longest(example: Example) -> int:
    return len(example.prompt) + max(map(len, example.responses))


def _padded_tokens(examples: Sequence[Example]) -> int:
    return sum(len(e.responses) for e in examples) * max(map(_longest, examples), default=0)


def _pack_padded(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Groups of like length together, so that little is padded: the longest first, rows filled in that order."""
    rows: list[list[int]] = []
    for group in sorted(range(len(examples)), key=lambda g: -_longest(examples[g])):
        if not rows or _padded_tokens([examples[g] for g in (*rows[-1], group)]) > max_tokens:
            rows.append([])
        rows[-1].append(group)
    return sorted(sorted(row) for row in rows)
