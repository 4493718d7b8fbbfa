"""Tensors of a model and the loss from groups of token ids."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .tree import TreeRow


class TokenGroup(Protocol):
    """A prompt, its K responses and their rewards."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]


class SharedPromptCollator:
    """Packs a list of groups into one row without repeated tokens or padding.

    A group is an object or mapping with `prompt` (token ids), `responses` (K lists of token ids) and `rewards` (K
    numbers), and optionally `ref_logps` (K numbers). A row of T tokens with B responses of N tokens together is

        input_ids, position_ids `[1, T]`    a group is `[prompt, response 1, ..., response K]`; the positions of each
                                            response go on from its prompt, and what responses share is there once
        visible_until           `[1, T]`    what `attention_mask` makes the attention's mask of
        labels                  `[N]`       the responses' tokens, response after response
        label_rows              `[N]`       the place in the row that predicts each of them; the prompt's last token
                                            predicts the first token of all K
        cu_seqlens              `[B + 1]`   where each response begins in `labels`
        rewards, ref_logps      `[B]`       `ref_logps` if the groups have them
        group_sizes                         K of each group, a list of ints

    so `rpo_loss(logits[0], labels, rewards, rows=label_rows, cu_seqlens=cu_seqlens, ...)` is its loss.

    Raises:
        ValueError: naming the group, if it has no prompt token, or not one reward for each response.
    """

    def __call__(self, groups: Sequence[TokenGroup | Mapping[str, Any]]) -> dict[str, Any]:
        row = TreeRow()
        rewards: list[float] = []
        ref_logps: list[float] | None = []
        sizes = []
        for index, group in enumerate(groups):
            prompt, responses, own = (_field(group, name) for name in ("prompt", "responses", "rewards"))
            if len(own) != len(responses):
                raise ValueError(f"group {index} has {len(responses)} responses but {len(own)} rewards")
            if not prompt:
                raise ValueError(f"group {index} has an empty prompt: nothing predicts its responses' first tokens")
            row.add(prompt, responses)
            rewards += own
            sizes.append(len(responses))
            known = _field(group, "ref_logps", None)
            ref_logps = None if ref_logps is None or known is None else [*ref_logps, *known]
        batch = row_tensors(row) | {"rewards": torch.tensor(rewards), "group_sizes": sizes}
        if ref_logps is not None:
            batch["ref_logps"] = torch.tensor(ref_logps)
        return batch


def labels_beside_inputs(
    groups: Sequence[tuple[list[int], list[list[int]]]], ignore_index: int = -100
) -> dict[str, Tensor]:
    """A row of shared prompts for losses that score `labels[t]` with the logits at `t - 1`, as trainers usually do.

    Each response starts with a copy of its prompt's last token, so that every label has an index and a row of its own:
    K - 1 tokens per group more than `SharedPromptCollator`, and only the prompts are shared.

    Args:
        groups: prompts and their responses, as token ids.
        ignore_index: the label of what is not scored.

    Returns:
        `input_ids`, `position_ids`, `visible_until` and `labels`, `[1, T]`, and `cu_seqlens` `[B + 1]`: the parts of
        the row that end with each response, the first of a group with its prompt.
    """
    row = TreeRow()
    labels: list[int] = []
    ends = [0]
    for prompt, responses in groups:
        start = row.open(prompt[:-1], 0)
        for response in responses:
            branch = row.open([prompt[-1], *response], len(prompt) - 1)
            row.close(branch, len(response) + 1)
            labels += [ignore_index] * (branch - len(labels) + 1) + response
            ends.append(len(labels))
        row.close(start, len(prompt) - 1)
    of_tokens = {"input_ids": row.input_ids, "position_ids": row.position_ids, "visible_until": row.visible_until}
    tensors = {name: torch.tensor([values]) for name, values in (of_tokens | {"labels": labels}).items()}
    return tensors | {"cu_seqlens": torch.tensor(ends)}


def row_tensors(row: TreeRow) -> dict[str, Tensor]:
    """The row as tensors: what the model takes `[1, T]`, the labels' packed `[N]`."""
    of_tokens = ("input_ids", "position_ids", "visible_until")
    of_labels = ("labels", "label_rows", "cu_seqlens")
    tensors = {name: torch.tensor([getattr(row, name)], dtype=torch.int64) for name in of_tokens}
    return tensors | {name: torch.tensor(getattr(row, name), dtype=torch.int64) for name in of_labels}


_MISSING = object()


def _field(group: Any, name: str, default: Any = _MISSING) -> Any:
    found = group.get(name, default) if isinstance(group, Mapping) else getattr(group, name, default)
    if found is _MISSING:
        raise ValueError(f"a group must have {name!r}, as a key or an attribute; got {type(group).__name__}")
    return found
