"""Preference data: from a JSONL file or a `datasets` directory to groups, in three forms recognised by their keys.

    {"prompt": P, "responses": [{"text": R, "reward": 1.5}, ...]}
    {"prompt": P, "chosen": R, "rejected": R}       rewards optional: chosen_reward/rejected_reward, score_chosen/...
    {"context": P, "completions": [{"rank": 0, "completion": R, "reward": 1.5}, ...]}      NeMo-RL's

P and R are strings or chat messages, `[{"role": ..., "content": ...}, ...]`. A chosen or rejected conversation may hold
the prompt's messages too, and then "prompt" may be left out. Pairs without rewards get 1 and 0; completions without
rewards get minus their rank (rank 0 is the best). Messages may hold "tool_calls" in place of content, and a record the
"tools" they call: both go to the chat template as they are. Files may be gzipped.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages

PAIR_REWARD_KEYS = (
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
)
MAX_ERRORS_SHOWN = 20
LARGEST_REWARD = 3.4028234e38  # float32


class DataError(ValueError):
    """Preference data that does not fit: names the file, the lines and what is wrong with each."""


@dataclass(frozen=True)
class Group:
    """A prompt, its K >= 2 responses and their rewards. Strings throughout, or messages throughout."""

    prompt: Text
    responses: list[Text]
    rewards: list[float]
    source: str = ""
    tools: list[dict] | None = None


def read_groups(path: str | Path, limit: int | None = None) -> list[Group]:
    """Read all groups of a JSONL file or a `datasets` directory (`save_to_disk`), or the first `limit` of them.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        DataError: listing every line that does not fit (the first 20 of them in full).
    """
    return list(iter_groups(path, limit))


def iter_groups(path: str | Path, limit: int | None = None) -> Iterator[Group]:
    """`read_groups` one by one; the bad lines are known, and raised, once all is read."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no preference data at {path}")
    count, errors = 0, []
    for source, raw in _rows(path) if path.is_dir() else _lines(path):
        if limit is not None and count == limit:
            break
        count += 1
        try:
            record = _record(raw)
            group = Group(*parse_record(record), source, _tools(record))
        except ValueError as error:
            errors.append(f"{source}: {error}")
        else:
            if not errors:
                yield group
    if errors:
        shown = errors[:MAX_ERRORS_SHOWN]
        more = [f"... and {len(errors) - len(shown)} more"] if len(errors) > len(shown) else []
        lines = "line" if len(errors) == 1 else "lines"
        raise DataError("\n  ".join([f"{len(errors)} bad {lines} of preference data:", *shown, *more]))
    if not count:
        raise DataError(f"{path}: holds no groups")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, which may be gzipped, without the blank ones at its end."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    blank: list[tuple[str, bytes]] = []
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                blank.append((f"{path}:{number}", line))
                if line.strip():
                    yield from blank
                    blank.clear()
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error


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
    record = _record(record)
    for keys, parse in FORMS:
        if all(key in record for key in keys):
            return _alike(*_checked(*parse(record)))
    forms = " or ".join(str(list(keys)) for keys, _ in FORMS)
    raise ValueError(f"keys {sorted(record)} fit no known form: expected {forms}")


def _record(record: str | bytes | dict) -> dict:
    if isinstance(record, str | bytes):
        if not record.strip():
            raise ValueError("empty line")
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:  # of the JSON or of its encoding
            raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {_kind(record)}")
    # A `datasets` directory holds None where a row lacks a column.
    return {key: value for key, value in record.items() if value is not None}


def _tools(record: dict) -> list[dict] | None:
    """The tools that a conversation may call: a list of JSON schemas, or that list as a string (TRL's form)."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is a string that is not valid JSON: {error}") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools must be a list of objects, got {_kind(tools)}")
    return tools


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
    """A string, or messages: what they hold beside role and content is for the chat template."""
    if isinstance(value, str):
        return _encodable(value, name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a string or a list of messages, got {_kind(value)}")
    return [_message(message, name) for message in value]


def _message(message: Any, name: str) -> dict[str, Any]:
    message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if message.get("tool_calls"):
        message.setdefault("content", "")
    else:
        message.pop("tool_calls", None)
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise ValueError(f"{name} must hold messages with a 'role' and a 'content' string, got {message!r}"[:300])
    _encodable(message["content"], name)
    return message


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {text[error.start]!r}, half of a character (a lone surrogate)") from None
    return text


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
    if not abs(number) <= LARGEST_REWARD:
        raise ValueError(f"{name} must be finite in float32, got {str(value)[:20]}")
    return number


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
