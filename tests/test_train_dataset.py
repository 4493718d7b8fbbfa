"""From groups to padded batches: tokens, truncation, chat templates."""

import numpy as np
import pytest
import torch

import rpo_kernels.train.dataset as dataset_module
from rpo_kernels.train import DataError, Group, GroupCollator, PreferenceDataset, read_groups
from rpo_kernels.train.demo import tokenizer
from training import dataset, with_reference, write_groups

TOKENIZER = tokenizer()
USER = [{"role": "user", "content": "Hi"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def encode(prompt, responses, max_length=1000, tok=TOKENIZER):
    return PreferenceDataset([Group(prompt, responses, [1.0, 0.0])], tok, max_length)[0]


def test_strings_are_the_prompt_then_the_response_then_its_end():
    example = encode("Hi é", ["a", "bc"])
    assert TOKENIZER.decode(example.prompt) == "Hi é"
    assert [TOKENIZER.decode(r) for r in example.responses] == ["a</s>", "bc</s>"]
    assert example.truncated_tokens == 0


def test_empty_prompt_still_lets_the_first_token_be_predicted():
    assert encode("", ["a", "b"]).prompt == [TOKENIZER.bos_token_id]


def test_prompt_is_cut_from_the_left_first():
    example = encode("0123456789", ["abc", "abcdef"], max_length=12)
    # The longest response needs 7 tokens with its end, so 5 are left for the prompt; 6 are kept in any case.
    assert TOKENIZER.decode(example.prompt) == "456789"
    assert [TOKENIZER.decode(r) for r in example.responses] == ["abc</s>", "abcdef"]
    assert example.truncated_tokens == 4 + 1


def test_short_prompt_is_kept_whole_and_long_responses_cut_from_the_right():
    example = encode("01", ["a" * 20, "b"], max_length=10)
    assert TOKENIZER.decode(example.prompt) == "01"
    assert [TOKENIZER.decode(r) for r in example.responses] == ["a" * 8, "b</s>"]
    assert example.truncated_tokens == 13


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 64])
def test_max_length_holds_and_cut_tokens_are_counted(max_length):
    whole, cut = dataset(8, max_length=10**6), dataset(8, max_length=max_length)
    for a, b in zip(list(whole), list(cut), strict=True):
        assert all(len(b.prompt) >= 1 and len(b.prompt) + len(r) <= max_length for r in b.responses)
        size = [len(e.prompt) + sum(map(len, e.responses)) for e in (a, b)]
        assert b.truncated_tokens == size[0] - size[1]
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        dataset(1, max_length=1)


def test_chat_template_of_the_tokenizer_is_used():
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = encode(USER, [answer("Yo"), answer("No") + USER], tok=tok)
    assert tok.decode(example.prompt) == "<user>Hi|<assistant>"
    assert [tok.decode(r) for r in example.responses] == ["Yo|", "No|<user>Hi|"]


def test_messages_without_a_chat_template_are_plain_lines():
    example = encode(USER, [answer("Yo"), answer("No")])
    assert TOKENIZER.decode(example.prompt) == "user: Hi\nassistant: "
    assert [TOKENIZER.decode(r) for r in example.responses] == ["Yo\n", "No\n"]


def test_a_template_that_rewrites_the_prompt_is_refused():
    tok = tokenizer()
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="starts with its prompt"):
        encode(USER, [answer("Yo"), answer("No")], tok=tok)


def test_a_cut_prompt_keeps_its_bos():
    tok = tokenizer()
    tok.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    example = encode([{"role": "user", "content": "0123456789"}], [answer("abc"), answer("d")], max_length=8, tok=tok)
    assert tok.decode(example.prompt) == "<s>6789" and example.truncated_tokens == 6
    example = encode([{"role": "user", "content": "0123456789"}], [answer("abc"), answer("d")], max_length=2, tok=tok)
    assert tok.decode(example.prompt) == "9"


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}]
TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% for m in messages %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}call:{{ call.function.name }}{% endfor %}|{% endfor %}"
)


def test_tool_calls_go_through_the_template():
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    example = PreferenceDataset([Group(USER, [CALL, answer("No")], [1.0, 0.0], tools=TOOLS)], tok, 100)[0]
    assert tok.decode(example.prompt) == "[weather]Hi|"
    assert [tok.decode(r) for r in example.responses] == ["call:weather|", "No|"]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}|{% endfor %}"])
def test_a_template_that_leaves_something_out_is_refused(template):
    tok = tokenizer()
    tok.chat_template = template
    for responses, tools, what in (
        ([CALL, answer("a")], None, "tool_calls"),
        ([answer("a"), answer("b")], TOOLS, "tools"),
    ):
        with pytest.raises(DataError, match=f"x:1: has {what}, which the tokenizer's chat template does not render"):
            PreferenceDataset([Group(USER, responses, [1.0, 0.0], "x:1", tools)], tok, 100)


def test_responses_with_the_same_tokens_are_counted():
    groups = [Group("p", ["a", "b", "a"], [1, 2, 3]), Group("p", ["a", "b"], [1, 2]), Group("p", ["cd", "ce"], [1, 2])]
    assert "1 responses in 1 groups have the same tokens" in PreferenceDataset(groups, TOKENIZER, 64).summary()
    assert "2 responses in 2 groups have the same tokens" in PreferenceDataset(groups, TOKENIZER, 2).summary()
    assert "same tokens" not in PreferenceDataset(groups[1:], TOKENIZER, 64).summary()


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the groups that reach the tokenizer."""
    seen = []
    original = dataset_module.tokenise
    monkeypatch.setattr(
        dataset_module, "tokenise", lambda groups, tok: (seen.append(1) or item for item in original(groups, tok))
    )
    return seen


def test_tokens_are_cached_by_what_they_depend_on(tmp_path, tokenised, capsys):
    path = tmp_path / "data.jsonl"
    write_groups(path, 5, (2, 3))

    def load(max_length=64, tok=TOKENIZER, limit=None):
        tokenised.clear()
        return PreferenceDataset.from_file(path, tok, max_length, limit, tmp_path / "cache"), len(tokenised)

    first, count = load()
    again, second_count = load()
    assert count == 5 and second_count == 0 and isinstance(again._arrays.tokens, np.memmap)
    assert list(first) == list(again) == list(PreferenceDataset(read_groups(path), TOKENIZER, 64))
    assert first.digest() == again.digest() and first.keys() == again.keys() and first.summary() == again.summary()
    other = tokenizer()
    other.chat_template = "x"
    assert [load(max_length=12)[1], load(tok=other)[1], load(limit=3)[1], load()[1]] == [5, 5, 3, 0]
    write_groups(path, 6, (2, 3))
    assert load()[1] == 6
    folder = max((tmp_path / "cache").iterdir(), key=lambda folder: folder.stat().st_mtime)
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-4])
    assert load()[1] == 6 and "is broken: tokenising again" in capsys.readouterr().out
    (folder / "rewards.npy").write_bytes(b"no")
    assert load()[1] == 6 and load()[1] == 0
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_sizes_and_slices():
    data = dataset(7, (2, 4, 3))
    examples = list(data)
    assert data.longest() == max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    assert data.largest_token() == max(t for e in examples for text in (e.prompt, *e.responses) for t in text)
    assert data[-1] == examples[-1] and [data.responses(1), data.responses(-1)] == [slice(2, 6), slice(18, 20)]
    with pytest.raises(IndexError):
        data[7]


def test_collator_pads_and_labels_responses_only():
    data = with_reference(dataset(3, sizes=(2, 3)))
    batch = GroupCollator(pad_token_id=0)(list(data))
    assert batch["group_sizes"] == [2, 3, 2] and batch["input_ids"].shape[0] == 7
    row = 0
    for example in data:
        for response, reward, ref in zip(example.responses, example.rewards, example.ref_logps, strict=True):
            n, m = len(example.prompt), len(response)
            padding = batch["input_ids"].shape[1] - n - m
            assert batch["input_ids"][row].tolist() == example.prompt + response + [0] * padding
            assert batch["labels"][row].tolist() == [-100] * n + response + [-100] * padding
            assert batch["attention_mask"][row].tolist() == [1] * (n + m) + [0] * padding
            torch.testing.assert_close(batch["rewards"][row].item(), reward, rtol=1e-6, atol=0)
            torch.testing.assert_close(batch["ref_logps"][row].item(), ref, rtol=1e-6, atol=0)
            row += 1
    first_label = min(int((labels != -100).nonzero()[0]) for labels in batch["labels"])
    assert batch["logits_to_keep"] == batch["input_ids"].shape[1] - first_label + 1


def test_collator_without_reference():
    assert "ref_logps" not in GroupCollator(0)(list(dataset(2)))
