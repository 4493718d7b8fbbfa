"""From groups of text to padded batches of tokens."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .data import DataError, Group, Messages, as_messages

IGNORE_INDEX = -100
# Used, with a warning, for chat messages where the tokenizer brings no template of its own.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
logger = logging.get_logger(__name__)


@dataclass
class Example:
    """One group as token ids."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]
    dropped_tokens: int  # cut off to fit max_length, over all responses (a prompt's cut counts once)
    ref_logps: list[float] | None = field(default=None)

    @property
    def key(self) -> str:
        """Digest of the tokens: what the reference's log-probabilities depend on, beside the model."""
        digest = hashlib.sha256()
        for ids in [self.prompt, *self.responses]:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(array("q", ids).tobytes())
        return digest.hexdigest()


class PreferenceDataset(Dataset):
    """Tokenised groups; an item is an `Example`.

    Args:
        groups: from `read_groups`.
        tokenizer: applied to prompt and response apart, so that all K responses share the prompt's tokens. A response
            given as a string ends with the tokenizer's end-of-sequence token; messages end as the chat template says.
        max_length: tokens of prompt and response together, at most. What is over is cut from the left of the prompt,
            down to half of max_length, then from the right of the response, and counted.
        progress: whether to show a progress bar.

    Raises:
        DataError: naming the group, if the chat template does not render the prompt as the start of a conversation.
    """

    def __init__(
        self, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = False
    ):
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
        bar = tqdm(groups, desc="Tokenising", unit=" groups", disable=not progress, leave=False)
        self.examples = [_encode(group, tokenizer, max_length) for group in bar]

    def __len__(self) -> int:
        return len(self.examples)

    def summary(self) -> str:
        """Groups, responses, and tokens kept and cut, in words."""
        responses = sum(len(e.responses) for e in self.examples)
        kept = sum(len(e.prompt) + sum(map(len, e.responses)) for e in self.examples)
        cut = sum(e.dropped_tokens for e in self.examples)
        return f"{len(self)} groups, {responses} responses, {kept} tokens and {cut} cut off by max_length"

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def _encode(group: Group, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    if isinstance(group.prompt, str):
        prompt, responses = _encode_strings(group, tokenizer)
    else:
        prompt, responses = _encode_messages(group, tokenizer)
    longest = max(map(len, responses))
    kept = min(len(prompt), max(max_length - longest, max_length // 2))
    room = max_length - kept
    dropped = len(prompt) - kept + sum(max(len(response) - room, 0) for response in responses)
    return Example(prompt[len(prompt) - kept :], [r[:room] for r in responses], group.rewards, dropped)


def _encode_strings(group: Group, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    eos = tokenizer.eos_token_id
    prompt = tokenizer(group.prompt)["input_ids"]
    if prompt and prompt[-1] == eos:
        prompt = prompt[:-1]
    if not prompt:
        # Something must stand before the first response token for it to be predicted from.
        prompt = [eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    responses = tokenizer(list(group.responses), add_special_tokens=False)["input_ids"]
    return prompt, [ids if eos is None else [*ids, eos] for ids in responses]


def _encode_messages(group: Group, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    if tokenizer.chat_template is None:
        logger.warning_once("The tokenizer has no chat template: messages are rendered as 'role: content' lines.")
    context = as_messages(group.prompt, "user")
    prompt = _render(tokenizer, context, add_generation_prompt=True)
    texts = [_render(tokenizer, context + as_messages(response, "assistant")) for response in group.responses]
    for text in texts:
        if not text.startswith(prompt):
            raise DataError(
                f"{group.source}: the chat template does not render a conversation so that it starts with its prompt; "
                f"prompt {prompt[-80:]!r}, conversation {text[: len(prompt)][-80:]!r}"
            )
    ids = tokenizer([prompt, *(text[len(prompt) :] for text in texts)], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1:]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> str:
    template = None if tokenizer.chat_template is not None else PLAIN_CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    return str(text)


class GroupCollator:
    """Pads a list of `Example` to one batch of B sequences, the responses to a prompt side by side.

    The batch: `input_ids`, `attention_mask`, `labels` (prompt and padding at -100, labels beside input_ids) `[B, T]`;
    `rewards` `[B]`; `ref_logps` `[B]` if the examples have them; `group_sizes`, `dropped_tokens`: a list of ints, one
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
            "dropped_tokens": [e.dropped_tokens for e in examples],
            "logits_to_keep": input_ids.shape[1] - int(prompts.min()) + 1,
        }
        if all(e.ref_logps is not None for e in examples):
            batch["ref_logps"] = torch.tensor([logp for e in examples for logp in e.ref_logps or []])
        return batch


def _pad(sequences: list[Tensor], value: int) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value)
