"""From examples to padded batches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .dataset import Example

IGNORE_INDEX = -100


class GroupCollator:
    """Pads a list of `Example` to one batch of B sequences, the responses to a prompt side by side.

    The batch: `input_ids`, `attention_mask`, `labels` (prompt and padding at -100, labels beside input_ids) `[B, T]`;
    `rewards` `[B]`; `ref_logps` `[B]` if the examples have them; `group_sizes`, `truncated_tokens`: a list of ints, one
    each group; `logits_to_keep`: how many of the last positions hold all that predicts a label.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict:
        pairs = [(e.prompt, response) for e in examples for response in e.responses]
        input_ids = _pad([torch.tensor(prompt + response) for prompt, response in pairs], self.pad_token_id)
        lengths = torch.tensor([len(prompt) + len(response) for prompt, response in pairs])
        prompts = torch.tensor([len(prompt) for prompt, _ in pairs])
        position = torch.arange(input_ids.shape[1])
        real = position < lengths[:, None]
        batch = {
            "input_ids": input_ids,
            "attention_mask": real.long(),
            "labels": input_ids.masked_fill(~real | (position < prompts[:, None]), IGNORE_INDEX),
            "rewards": torch.tensor([reward for e in examples for reward in e.rewards]),
            "group_sizes": [len(e.responses) for e in examples],
            "truncated_tokens": [e.truncated_tokens for e in examples],
            "logits_to_keep": input_ids.shape[1] - int(prompts.min()) + 1,
        }
        if all(e.ref_logps is not None for e in examples):
            batch["ref_logps"] = torch.tensor([logp for e in examples for logp in e.ref_logps or []])
        return batch


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value)
