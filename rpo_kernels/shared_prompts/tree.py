"""Groups of token ids laid out in one row without repeated tokens.

A group is a tree: the prompt is its root, and responses branch where their tokens differ. The row holds the trees one
after another, each in depth-first order, so that all continuations of a token follow it directly. Attention then needs
one number per token, the index at which its branch ends: a token attends to those before it whose branch contains it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class TreeRow:
    """One row of T tokens holding the trees of several groups, and where the N response tokens are predicted."""

    input_ids: list[int] = field(default_factory=list)  # [T]
    position_ids: list[int] = field(default_factory=list)  # [T] distance from the group's first token
    visible_until: list[int] = field(default_factory=list)  # [T] index at which the branch of a token ends
    labels: list[int] = field(default_factory=list)  # [N] the responses' tokens, response after response
    label_rows: list[int] = field(default_factory=list)  # [N] place of the token that predicts the label
    cu_seqlens: list[int] = field(default_factory=lambda: [0])  # [B + 1] where each response's labels begin

    def add(self, prompt: list[int], responses: Sequence[list[int]]) -> None:
        """Append the tree of one group.

        Raises:
            ValueError: if the prompt is empty; nothing would predict the responses' first tokens.
        """
        if not prompt:
            raise ValueError(
                "prompt must hold at least one token, from which the responses' first tokens are predicted"
            )
        start = self.open(prompt, 0)
        places: list[list[int]] = [[len(self.input_ids) - 1] for _ in responses]
        self._branch(responses, list(range(len(responses))), 0, len(prompt), places)
        self.close(start, len(prompt))
        for response, place in zip(responses, places, strict=True):
            self.labels += response
            self.label_rows += place[: len(response)]
            self.cu_seqlens.append(len(self.labels))

    def _branch(
        self,
        responses: Sequence[list[int]],
        members: list[int],
        depth: int,
        position: int,
        places: list[list[int]],
    ) -> None:
        """Lay out `members` of the responses from their token `depth` on; they have the same tokens before it."""
        by_token: dict[int, list[int]] = {}
        for member in members:
            if depth < len(responses[member]):
                by_token.setdefault(responses[member][depth], []).append(member)
        for branch in by_token.values():
            end = _common_length([responses[member] for member in branch], depth)
            start = self.open(responses[branch[0]][depth:end], position)
            for member in branch:
                places[member] += range(start, len(self.input_ids))
            self._branch(responses, branch, end, position + end - depth, places)
            self.close(start, end - depth)

    def open(self, tokens: list[int], position: int) -> int:
        """Append a branch's tokens, which stand at `position` and after; returns where the first one is placed."""
        start = len(self.input_ids)
        self.input_ids += tokens
        self.position_ids += range(position, position + len(tokens))
        self.visible_until += [0] * len(tokens)
        return start

    def close(self, start: int, length: int) -> None:
        """End the branch of `length` tokens from `start` on: what is appended now does not continue it."""
        self.visible_until[start : start + length] = [len(self.input_ids)] * length


def tree_size(prompt: list[int], responses: Sequence[list[int]]) -> int:
    """How many tokens `TreeRow.add` appends for a group."""
    ordered = sorted(responses)
    shared = sum(_common_length([a, b], 0) for a, b in pairwise(ordered))
    return len(prompt) + sum(map(len, responses)) - shared


def _common_length(sequences: Sequence[list[int]], start: int) -> int:
    """The length of the longest common prefix of sequences that agree up to `start`."""
    low, high = min(sequences), max(sequences)  # all others lie between, and share what these share
    end = start
    while end < len(low) and end < len(high) and low[end] == high[end]:
        end += 1
    return end
