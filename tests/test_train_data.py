"""Preference data: three forms, strings and messages, and what is said about a bad line."""

import gzip
import json

import pytest

from rpo_kernels.train.data import DataError, parse_record, read_groups

USER = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello!", "What?"))


def responses(*rewards):
    return [{"text": f"r{i}", "reward": reward} for i, reward in enumerate(rewards)]


FORMS = {
    "responses": (
        {"prompt": "p", "responses": responses(1, -0.5, 3), "source": "kept out"},
        ("p", ["r0", "r1", "r2"], [1.0, -0.5, 3.0]),
    ),
    "pair": ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", ["a", "b"], [1.0, 0.0])),
    "pair, suffix": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": 4, "rejected_reward": 2},
        ("p", ["a", "b"], [4.0, 2.0]),
    ),
    "pair, prefix": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 0.5, "score_rejected": -1},
        ("p", ["a", "b"], [0.5, -1.0]),
    ),
    "completions": (
        {
            "context": [USER],
            "completions": [
                {"rank": 0, "completion": [GOOD], "reward": 2.5},
                {"rank": 1, "completion": [BAD], "reward": 0},
            ],
        },
        ([USER], [[GOOD], [BAD]], [2.5, 0.0]),
    ),
    "completions by rank": (
        {"context": "p", "completions": [{"rank": 1, "completion": "b"}, {"rank": 0, "completion": "a"}]},
        ("p", ["b", "a"], [-1.0, 0.0]),
    ),
    "messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ([USER], [[GOOD], [BAD]], [1.0, 0.0])),
    "prompt in the conversation": (
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        ([USER], [[GOOD], [BAD]], [1.0, 0.0]),
    ),
    "implicit prompt": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [[GOOD], [BAD]], [1.0, 0.0])),
    "string answers to messages": (
        {"prompt": [USER], "responses": [{"text": "Hello!", "reward": 1}, {"text": "What?", "reward": 0}]},
        ([USER], [[GOOD], [BAD]], [1.0, 0.0]),
    ),
    "null column": (
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_reward": None, "rejected_reward": None},
        ("p", ["a", "b"], [1.0, 0.0]),
    ),
}


@pytest.mark.parametrize("record, expected", FORMS.values(), ids=FORMS)
def test_forms(record, expected):
    assert parse_record(record) == expected
    assert parse_record(json.dumps(record)) == expected


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
MISTAKES = {
    "not valid JSON": "{'prompt': 1}",
    "empty line": "   ",
    "expected a JSON object, got a list": "[1]",
    "fit no known form": {"question": "p", "answer": "a"},
    "responses must be a list, got a string": {"prompt": "p", "responses": "r"},
    "responses[1] must be an object": {"prompt": "p", "responses": [{"text": "a", "reward": 1}, "b"]},
    "responses[1] has no 'reward'": {"prompt": "p", "responses": [{"text": "a", "reward": 1}, {"text": "b"}]},
    "responses[0].reward must be a number, got a string": {"prompt": "p", "responses": responses("1", 2)},
    "responses[0].reward must be a number, got a boolean": {"prompt": "p", "responses": responses(True, 2)},
    "responses[1].reward must be finite": {"prompt": "p", "responses": responses(1, float("nan"))},
    "responses[0].reward must be finite in float32, got 3.5e+38": {"prompt": "p", "responses": responses(3.5e38, 1)},
    "prompt holds '\\udc80', half of a character": {**PAIR, "prompt": "\udc80"},
    "at least two responses, got 1": {"prompt": "p", "responses": responses(1)},
    "at least two responses, got 0": {"prompt": "p", "responses": []},
    "prompt must be a string or a list of messages": {"prompt": 3, "responses": responses(1, 2)},
    "messages with a 'role' and a 'content'": {**PAIR, "prompt": [{"role": "user"}]},
    "has 'chosen_reward' but not 'rejected_reward'": {**PAIR, "chosen_reward": 1},
    "need a 'prompt'": {"chosen": "a", "rejected": "b"},
    "do not start with the same messages": {"chosen": [GOOD], "rejected": [BAD]},
    "chosen has no message after the prompt's": {"prompt": [USER], "chosen": [USER], "rejected": [BAD]},
    "completions[0] has no 'rank'": {"context": "p", "completions": [{"completion": "a"}, {"completion": "b"}]},
    "some of completions have a reward": {
        "context": "p",
        "completions": [{"rank": 0, "completion": "a", "reward": 1}, {"rank": 1, "completion": "b"}],
    },
}


@pytest.mark.parametrize("message, record", MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_named(message, record):
    with pytest.raises(ValueError) as error:
        parse_record(record)
    assert message in str(error.value)


def test_bad_lines_are_all_reported_with_their_place(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(PAIR), "", json.dumps({"prompt": "p"}), json.dumps(PAIR)]) + "\n")
    with pytest.raises(DataError) as error:
        read_groups(path)
    text = str(error.value)
    assert "2 bad lines" in text and f"{path}:2: empty line" in text and f"{path}:3: keys ['prompt']" in text


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "p", "chosen": "a", "rejected": "b", '
        + b'"chosen_reward": 1'
        + b"0" * 400
        + b', "rejected_reward": 0}',
    ],
    ids=["not text", "too large"],
)
def test_bytes_and_numbers_out_of_range_are_bad_lines_too(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="bad line") as error:
        read_groups(path)
    assert f"{path}:2: " in str(error.value)


def test_gzip_and_blank_lines_at_the_end(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write((json.dumps(PAIR) + "\n") * 2 + "\n  \n")
    assert [group.source for group in read_groups(path)] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_groups(path)


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["none", "null", "empty"])
def test_tool_calls_and_tools_are_kept(tmp_path, content):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    record = {"prompt": [USER], "chosen": [CALL | content], "rejected": [GOOD]}
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(record | {"tools": form}) + "\n" for form in (tools, json.dumps(tools), [])))
    groups = read_groups(path)
    assert all(group.responses == [[CALL | {"content": ""}], [GOOD]] for group in groups)
    assert [group.tools for group in groups] == [tools, tools, None]
    path.write_text(json.dumps(record | {"tools": "f"}) + "\n" + json.dumps(record | {"tools": [1]}) + "\n")
    with pytest.raises(
        DataError, match=r"tools is a string that is not valid JSON(.|\n)*tools must be a list of objects"
    ):
        read_groups(path)


def test_a_long_list_of_bad_lines_is_cut(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n" * 50)
    with pytest.raises(DataError, match="50 bad lines") as error:
        read_groups(path)
    assert str(error.value).count("fit no known form") == 20 and "... and 30 more" in str(error.value)


def test_source_limit_and_absent_files(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text((json.dumps(PAIR) + "\n") * 3)
    assert [group.source for group in read_groups(path)] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert len(read_groups(path, limit=2)) == 2
    with pytest.raises(FileNotFoundError, match="no preference data"):
        read_groups(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no groups"):
        read_groups(tmp_path / "empty.jsonl")


def test_datasets_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    record, expected = FORMS["completions"]
    data = datasets.Dataset.from_list([record, FORMS["completions by rank"][0] | {"context": [USER]}][:1] * 2)
    data.save_to_disk(tmp_path / "data")
    read = read_groups(tmp_path / "data")
    assert [(g.prompt, g.responses, g.rewards) for g in read] == [expected] * 2
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits.*splits/train"):
        read_groups(tmp_path / "splits")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="neither a file nor a directory written by datasets"):
        read_groups(tmp_path / "nothing")


@pytest.mark.parametrize("part, count", [("train", 96), ("test", 32)])
def test_demonstration_data(part, count):
    from rpo_kernels.train.demo import DATA

    groups = read_groups(DATA / f"{part}.jsonl")
    assert len(groups) == count
    for group in groups:
        assert len(set(group.responses)) == 4 and len(set(group.rewards)) == 4


def test_demonstration_holds_prompts_out():
    from rpo_kernels.train.demo import DATA

    train, test = (read_groups(DATA / f"{part}.jsonl") for part in ("train", "test"))
    assert not {group.prompt for group in train} & {group.prompt for group in test}
