"""Groups of responses for `RPOTrainer`: from rows of text or messages to padded batches."""

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers.data.data_collator import DataCollatorMixin
from trl.data_utils import _tokenize, common_prefix_length, extract_prompt, is_conversational
from trl.trainer.utils import pad

from ...shared_prompts import labels_beside_inputs

TOKENIZED = ("prompt_ids", "responses_ids", "rewards")


@dataclass
class GroupCollator(DataCollatorMixin):
    """Batches examples with `prompt_ids`, `responses_ids` (K lists), `rewards` (K) and, where computed, `ref_logps`.

    The responses of all groups stand one below the other, group after group: `input_ids`, `attention_mask` and
    `completion_mask` `[B, T]`, `rewards`, `group_ids` and `ref_logps` `[B]`. With `shared_prompts` they stand one after
    the other behind their prompt: `input_ids`, `position_ids`, `visible_until` and `completion_mask` `[1, T]`, and
    `cu_seqlens` `[B + 1]`, see `rpo_kernels.shared_prompts.labels_beside_inputs`, and `num_tokens` of the sequences.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    shared_prompts: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch."""
        sizes = [len(example["responses_ids"]) for example in examples]
        rewards = [reward for example in examples for reward in example["rewards"]]
        ref_logps = [
            logp  # of each group padded to the widest
            for example in examples
            for logp in example.get("ref_logps", [])[: len(example["rewards"])]
        ]
        batch = self._shared(examples) if self.shared_prompts else self._padded(examples)
        batch["rewards"] = torch.tensor(rewards, dtype=torch.float32)
        batch["group_ids"] = torch.repeat_interleave(torch.tensor(sizes))
        if ref_logps:
            batch["ref_logps"] = torch.tensor(ref_logps, dtype=torch.float32)
        return batch

    def _shared(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        groups = []
        for example in examples:
            prompt, responses = [*example["prompt_ids"]], [[*response] for response in example["responses_ids"]]
            if not prompt:
                return self._padded(examples)  # no tokens are shared
            if self.max_length is not None:
                room = self.max_length - len(prompt)
                if self.truncation_mode == "keep_end" and any(len(response) > room for response in responses):
                    return self._padded(examples)  # each response keeps another part of the prompt
                responses = [response[:room] for response in responses]
            groups.append((prompt, responses))
        row = labels_beside_inputs(groups)
        # As TRL counts them, each response with its prompt.
        tokens = sum(len(prompt) + len(response) for prompt, responses in groups for response in responses)
        return row | {"completion_mask": (row.pop("labels") != -100).long(), "num_tokens": torch.tensor(tokens)}

    def _padded(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        kept = slice(None, self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            kept = slice(-self.max_length, None)
        tokens, scored = [], []
        for example in examples:
            prompt = example["prompt_ids"]
            for response in example["responses_ids"]:
                tokens.append(torch.tensor([*prompt, *response][kept]))
                scored.append(torch.tensor([*[0] * len(prompt), *[1] * len(response)][kept]))
        return {
            "input_ids": self._pad(tokens, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(x) for x in tokens], 0),
            "completion_mask": self._pad(scored, 0),
        }

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad(rows, value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def tokenize_groups(
    dataset: Any, processing_class: Any, reward_columns: tuple[str, ...], ranking_only: bool, args: Any, name: str
) -> Any:
    """A dataset of `prompt`, `responses` and `rewards`, or of `chosen` and `rejected`, as token ids.

    Args:
        dataset: a `Dataset` or an `IterableDataset`; returned as it is if it holds token ids already.
        reward_columns: of the rewards of `chosen` and `rejected`.
        ranking_only: without rewards, use 1 for `chosen` and 0 for `rejected`.
        args: `max_length`, `truncation_mode` and `dataset_num_proc` are read.
        name: for progress bars.

    Raises:
        ValueError: naming the columns that are missing.
    """
    first = next(iter(dataset))
    if all(column in first for column in TOKENIZED):
        return dataset
    if "image" in first or "images" in first:
        raise ValueError("RPOTrainer trains on text; the dataset has images")
    finite = isinstance(dataset, datasets.Dataset)
    options: dict[str, Any] = {"num_proc": args.dataset_num_proc} if finite else {}

    def describe(what: str) -> dict[str, str]:
        return {"desc": f"{what} {name} dataset"} if finite else {}

    if "responses" not in first:
        if "prompt" not in first:
            dataset = dataset.map(extract_prompt, **options, **describe("Extracting prompts of"))
        columns = _pair_columns(first, reward_columns, ranking_only)
        dataset = dataset.map(_pair_as_group, fn_kwargs={"columns": columns}, **options, **describe("Grouping"))
    elif not {"prompt", "rewards"} <= set(first):
        raise ValueError(f"the {name} dataset needs prompt, responses and rewards; it has {sorted(first)}")
    dataset = dataset.map(
        _tokenize_group, fn_kwargs={"processing_class": processing_class}, **options, **describe("Tokenizing")
    )
    if args.max_length is not None and args.truncation_mode == "keep_start":
        # No token of the responses would be left.
        dataset = dataset.filter(
            _prompt_is_shorter, fn_kwargs={"length": args.max_length}, **options, **describe("Filtering")
        )
    return dataset


def _pair_columns(first: dict, reward_columns: tuple[str, ...], ranking_only: bool) -> tuple[str, ...] | None:
    if not {"chosen", "rejected"} <= set(first):
        raise ValueError(f"the dataset needs responses and rewards, or chosen and rejected; it has {sorted(first)}")
    if set(reward_columns) <= set(first) and len(reward_columns) == 2:
        return reward_columns
    if ranking_only:
        return None
    raise ValueError(
        f"the objective needs the rewards of chosen and rejected in the columns {list(reward_columns)} "
        f"(args.reward_columns); the dataset has {sorted(first)}"
    )


def _pair_as_group(example: dict, columns: tuple[str, ...] | None) -> dict:
    rewards = [1.0, 0.0] if columns is None else [float(example[column]) for column in columns]
    return {"responses": [example["chosen"], example["rejected"]], "rewards": rewards}


def _tokenize_group(example: dict, processing_class: Any) -> dict:
    prompt, responses = example["prompt"], example["responses"]
    if not responses or len(responses) != len(example["rewards"]):
        raise ValueError(
            f"every example needs a reward for each of its responses; got {len(responses)} responses and "
            f"{len(example['rewards'])} rewards for the prompt {prompt!r}"
        )
    if is_conversational({"prompt": prompt}):
        template = example.get("chat_template_kwargs") or {}
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **template)["input_ids"]
        texts = [_tokenize(processing_class, [*prompt, *response], **template)["input_ids"] for response in responses]
    else:
        end = processing_class.eos_token
        prompt_ids = _tokenize(processing_class, prompt)["input_ids"]
        ended = [response if response.endswith(end) else response + end for response in responses]
        texts = [_tokenize(processing_class, prompt + response)["input_ids"] for response in ended]
    # Tokens may merge where prompt and response meet.
    start = min(common_prefix_length(prompt_ids, text) for text in texts)
    return {"prompt_ids": prompt_ids[:start], "responses_ids": [text[start:] for text in texts]}


def _prompt_is_shorter(example: dict, length: int) -> bool:
    return len(example["prompt_ids"]) < length
