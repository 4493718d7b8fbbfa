"""Preference data: from a JSONL file or a `datasets` directory to groups, in three forms recognised by their keys.

    {"prompt": P, "responses": [{"text": R, "reward": 1.5}, ...]}
    {"prompt": P, "chosen": R, "rejected": R}       rewards optional: chosen_reward/rejected_reward, score_chosen/...
    {"context": P, "completions": [{"rank": 0, "completion": R, "reward": 1.5}, ...]}      NeMo-RL's

P and R are strings or chat messages, `[{"role": ..., "content": ...}, ...]`. A chosen or rejected conversation may hold
the prompt's messages too, and then "prompt" may be left out. Pairs without rewards get 1 and 0; completions without
rewards get minus their rank (rank 0 is the best).
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
Text = str | Messages

PAIR_REWARD_KEYS = (
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
)
MAX_ERRORS_SHOWN = 20


class DataError(ValueError):
    """Preference data that does not fit: names the file, the lines and what is wrong with each."""


@dataclass(frozen=True)
class Group:
    """A prompt, its K >= 2 responses and their rewards. Strings throughout, or messages throughout."""

    prompt: Text
    responses: list[Text]
    rewards: list[float]
    source: str = ""


def read_groups(path: str | Path, limit: int | None = None) -> list[Group]:
    """Read all groups of a JSONL file or a `datasets` directory (`save_to_disk`), or the first `limit` of them.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        DataError: listing every line that does not fit (the first 20 of them in full).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no preference data at {path}")
    groups: list[Group] = []
    errors: list[str] = []
    for source, record in _rows(path) if path.is_dir() else _lines(path):
        if limit is not None and len(groups) + len(errors) == limit:
            break
        try:
            prompt, responses, rewards = parse_record(record)
            groups.append(Group(prompt, responses, rewards, source))
        except ValueError as error:
            errors.append(f"{source}: {error}")
    if errors:
        shown = errors[:MAX_ERRORS_SHOWN]
        more = [f"... and {len(errors) - len(shown)} more"] if len(errors) > len(shown) else []
        lines = "line" if len(errors) == 1 else "lines"
        raise DataError("\n  ".join([f"{len(errors)} bad {lines} of preference data:", *shown, *more]))
    if not groups:
        raise DataError(f"{path}: holds no groups")
    return groups


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", line


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: neither a file nor a directory written by datasets' save_to_disk") from error
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(str(path / name) for name in dataset)
        raise DataError(f"{path}: holds several splits; give one of {splits}")
    for number, row in enumerate(dataset):
        yield f"{path} row {number}", row


def parse_record(record: str | bytes | dict) -> tuple[Text, list[Text], list[float]]:
    """Prompt, responses and rewards of one record: a line of JSON or a dict.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if isinstance(record, str | bytes):
        if not record.strip():
            raise ValueError("empty line")
        try:
            record = json.loads(record)
        except ValueError as error:  # of the JSON or of its encoding
            raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {_kind(record)}")
    # A `datasets` directory holds None where a row lacks a column.
    record = {key: value for key, value in record.items() if value is not None}
    for keys, parse in FORMS:
        if all(key in record for key in keys):
            return _alike(*_checked(*parse(record)))
    forms = " or ".join(str(list(keys)) for keys, _ in FORMS)
    raise ValueError(f"keys {sorted(record)} fit no known form: expected {forms}")


def _parse_responses(record: dict) -> tuple[Text, list[Text], list[float]]:
    prompt = _text(record["prompt"], "prompt")
    responses, rewards = [], []
    for name, item in _items(record["responses"], "responses"):
        responses.append(_response(prompt, _need(item, "text", name), f"{name}.text"))
        rewards.append(_number(_need(item, "reward", name), f"{name}.reward"))
    return prompt, responses, rewards


def _parse_pair(record: dict) -> tuple[Text, list[Text], list[float]]:
    chosen, rejected = (_text(record[key], key) for key in ("chosen", "rejected"))
    prompt = _text(record["prompt"], "prompt") if "prompt" in record else _common_prompt(chosen, rejected)
    responses = [_response(prompt, chosen, "chosen"), _response(prompt, rejected, "rejected")]
    for keys in PAIR_REWARD_KEYS:
        given = [key for key in keys if key in record]
        if len(given) == 1:
            raise ValueError(f"has {given[0]!r} but not {(set(keys) - set(given)).pop()!r}")
        if given:
            return prompt, responses, [_number(record[key], key) for key in keys]
    return prompt, responses, [1.0, 0.0]


def _parse_completions(record: dict) -> tuple[Text, list[Text], list[float]]:
    prompt = _text(record["context"], "context")
    items = list(_items(record["completions"], "completions"))
    responses = [_response(prompt, _need(item, "completion", name), f"{name}.completion") for name, item in items]
    rewarded = [item.get("reward") is not None for _, item in items]
    if any(rewarded) and not all(rewarded):
        raise ValueError("some of completions have a reward and some do not")
    if items and all(rewarded):
        return prompt, responses, [_number(item["reward"], f"{name}.reward") for name, item in items]
    return prompt, responses, [-_number(_need(item, "rank", name), f"{name}.rank") for name, item in items]


Parser = Callable[[dict], tuple[Text, list[Text], list[float]]]
FORMS: tuple[tuple[tuple[str, ...], Parser], ...] = (
    (("prompt", "responses"), _parse_responses),
    (("chosen", "rejected"), _parse_pair),
    (("context", "completions"), _parse_completions),
)


def _checked(prompt: Text, responses: list[Text], rewards: list[float]) -> tuple[Text, list[Text], list[float]]:
    if len(responses) < 2:
        raise ValueError(f"a group needs at least two responses, got {len(responses)}")
    return prompt, responses, rewards


def _alike(prompt: Text, responses: list[Text], rewards: list[float]) -> tuple[Text, list[Text], list[float]]:
    """All messages as soon as one of them is, else all strings."""
    if all(isinstance(text, str) for text in [prompt, *responses]):
        return prompt, responses, rewards
    return as_messages(prompt, "user"), [as_messages(text, "assistant") for text in responses], rewards


def as_messages(text: Text, role: str) -> Messages:
    """The text, or one message of that role which holds it."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _text(value: Any, name: str) -> Text:
    """A string, or messages reduced to role and content."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a string or a list of messages, got {_kind(value)}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{name} must hold messages with a 'role' and a 'content' string, got {message!r}"[:300])
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _response(prompt: Text, value: Any, name: str) -> Text:
    """The response without the prompt's messages, which a full conversation starts with."""
    response = _text(value, name)
    if isinstance(response, str):
        return response
    context = as_messages(prompt, "user")
    if response[: len(context)] == context:
        response = response[len(context) :]
    if not response:
        raise ValueError(f"{name} has no message after the prompt's")
    return response


def _common_prompt(chosen: Text, rejected: Text) -> Messages:
    """The messages with which two conversations both start; each keeps at least its last message."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("chosen and rejected strings need a 'prompt'")
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and chosen[size] == rejected[size]:
        size += 1
    if size == 0:
        raise ValueError("has no 'prompt', and chosen and rejected do not start with the same messages")
    return chosen[:size]


def _items(value: Any, name: str) -> Iterator[tuple[str, dict]]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {_kind(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"{name}[{index}] must be an object, got {_kind(item)}")
        yield f"{name}[{index}]", item


def _need(item: dict, key: str, name: str) -> Any:
    if item.get(key) is None:
        raise ValueError(f"{name} has no {key!r}")
    return item[key]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {str(value)[:20]}")
    return number


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
