"""From groups of token ids to the tensors a model and the loss take."""

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
    """Packs a list of groups into one row in which no token is there twice, without padding.

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
