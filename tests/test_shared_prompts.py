"""Shared prompts against separate sequences: the layout, and exactness in many model families."""

import random

import pytest
import torch

pytest.importorskip("transformers")

from torch.nn.utils.rnn import pad_sequence

from rpo_kernels import token_logprobs
from rpo_kernels.shared_prompts import (
    SharedPromptCollator,
    attention_mask,
    check_shared_prompts,
    labels_beside_inputs,
    pack_by_tokens,
    tree_mask_function,
    unsupported_reason,
)
from rpo_kernels.shared_prompts.plan import padded_size, shared_size
from rpo_kernels.shared_prompts.tree import tree_size
from tiny_models import tiny

EXACT = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "granite", "cohere", "cohere2", "gpt_neox")
EXACT += ("gpt_oss", "mixtral", "gpt2", "llama4")
NO_SDPA = ("gemma2", "gpt_oss")  # transformers: their softcap or sinks are eager's


def group(rng: random.Random, prompt: int, responses: list[int], common: int = 0) -> dict:
    """Random tokens; the responses start with `common` tokens that all share."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 97) for _ in range(count)]

    first = tokens(common)
    return {
        "prompt": tokens(prompt),
        "responses": [first + tokens(length) for length in responses],
        "rewards": [rng.gauss(0, 1) for _ in responses],
    }


def ragged_groups() -> list[dict]:
    """K from 1 to 6; prompts and responses of one token, shared first parts, two equal responses, an empty one."""
    rng = random.Random(0)
    groups = [
        group(rng, 9, [4, 7, 1]),
        group(rng, 1, [3]),
        group(rng, 5, [1, 1]),
        group(rng, 12, [8, 3, 5, 2], common=3),
        group(rng, 4, [5, 6, 2, 9, 1]),
        group(rng, 1, [0, 4]),
    ]
    groups[4]["responses"].append(groups[4]["responses"][0])
    groups[4]["rewards"].append(0.0)
    return groups


def padded_logps(model: torch.nn.Module, groups: list[dict]) -> torch.Tensor:
    """Log-probability of each response, as separate padded sequences."""
    pairs = [(len(g["prompt"]), torch.tensor(g["prompt"] + r)) for g in groups for r in g["responses"]]
    ids = pad_sequence([sequence for _, sequence in pairs], batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for _, sequence in pairs], batch_first=True)
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    return torch.stack([logps[i, p - 1 : len(s) - 1].gather(-1, s[p:, None]).sum() for i, (p, s) in enumerate(pairs)])


def shared_logps(model: torch.nn.Module, groups: list[dict]) -> torch.Tensor:
    batch = SharedPromptCollator()(groups)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, attention_mask=attention_mask(model, batch), use_cache=False).logits[0]
    logps = logits.log_softmax(-1)[batch["label_rows"], batch["labels"]]
    return torch.segment_reduce(logps, "sum", offsets=batch["cu_seqlens"], initial=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EXACT)
def test_same_losses_and_gradients_as_separate_sequences(family, attention):
    """Log-probabilities and every parameter's gradient, to float32's accuracy."""
    if attention == "sdpa" and family in NO_SDPA:
        pytest.skip(f"{family} has no SDPA attention in transformers")
    groups = ragged_groups()
    assert unsupported_reason(tiny(family, attention)) is None
    results = []
    for compute in (padded_logps, shared_logps):
        model = tiny(family, attention)
        logps = compute(model, groups)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append((logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (logps, shared) = results
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-5)
    assert gradients.keys() == shared.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Some gradients are zero but for rounding, as a key's bias is: its error is measured by what was summed.
        assert (shared[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 0.1 * largest), name


def test_each_token_is_there_once():
    """Prompt, then responses; what responses share is there once; positions go on from the prompt."""
    groups = [{"prompt": [1, 2], "responses": [[5, 6, 7], [5, 6, 8], [9], [5, 6, 7]], "rewards": [0.0] * 4}]
    batch = SharedPromptCollator()([*groups, {"prompt": [3], "responses": [[4]], "rewards": [1.0]}])
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6, 7, 8, 9, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 2, 0, 1]]
    assert batch["visible_until"].tolist() == [[7, 7, 6, 6, 5, 6, 7, 9, 9]]
    assert batch["labels"].tolist() == [5, 6, 7, 5, 6, 8, 9, 5, 6, 7, 4]
    assert batch["label_rows"].tolist() == [1, 2, 3, 1, 2, 3, 1, 1, 2, 3, 7]
    assert batch["cu_seqlens"].tolist() == [0, 3, 6, 7, 10, 11]
    assert batch["group_sizes"] == [4, 1] and batch["rewards"].tolist() == [0, 0, 0, 0, 1]


def test_sizes_are_what_the_layout_takes():
    for example in ragged_groups():
        row = SharedPromptCollator()([example])["input_ids"]
        assert tree_size(example["prompt"], example["responses"]) == row.numel()
    assert padded_size(2, [1, 3]).tokens == 10 and shared_size(2, [1, 3]).tokens == 6


def test_blocks_outside_the_tree_are_skipped():
    """FlexAttention's block mask holds the blocks of the dense mask, and not those between responses or groups."""
    from torch.nn.attention.flex_attention import create_block_mask

    rng = random.Random(1)
    batch = SharedPromptCollator()([group(rng, 128, [128, 128, 128]), group(rng, 128, [128])])
    mask = tree_mask_function(batch["visible_until"])
    blocks = create_block_mask(mask, 1, None, 768, 768, device="cpu", BLOCK_SIZE=128)
    expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    expected += [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert blocks.to_dense()[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba", {}, "linear_attention layers"),
        ("bloom", {}, "ALiBi"),
        ("gpt_neo", {}, "places, not positions"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits"),
        ("gemma3", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_models_that_cannot_share_are_recognised(family, changes, reason):
    with pytest.raises(ValueError, match=reason):
        check_shared_prompts(tiny(family, **changes))


def test_a_model_that_differs_is_found_by_trying():
    """A model whose states depend on the place in the row, which no configuration tells."""
    model = tiny("llama")
    check_shared_prompts(model)
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].cumsum(1),))
    with pytest.raises(ValueError, match="logits differ"):
        check_shared_prompts(model)


def test_rotary_embeddings_that_depend_on_the_longest():
    scheme = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny("llama", rope_parameters=scheme)
    assert unsupported_reason(model, longest=128) is None
    assert "rotary" in unsupported_reason(model, longest=129)


def test_flash_attention_takes_no_tree():
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in unsupported_reason(model)


def test_bad_groups_are_named():
    collate = SharedPromptCollator()
    good = {"prompt": [1], "responses": [[2]], "rewards": [0.0]}
    with pytest.raises(ValueError, match="group 1 has an empty prompt"):
        collate([good, good | {"prompt": []}])
    with pytest.raises(ValueError, match="group 0 has 1 responses but 2 rewards"):
        collate([good | {"rewards": [0.0, 1.0]}])
    with pytest.raises(ValueError, match="'rewards'"):
        collate([{"prompt": [1], "responses": [[2]]}])


def test_packing_by_tokens():
    """First fit, largest first; a group above the limit alone; every group once."""
    assert pack_by_tokens([4, 9, 3, 6, 2], 10) == [[0, 3], [1], [2, 4]]
    assert pack_by_tokens([40, 1], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="max_tokens"):
        pack_by_tokens([1], 0)
    sizes = [random.Random(2).randrange(1, 50) for _ in range(200)]
    rows = pack_by_tokens(sizes, 64)
    assert sorted(g for row in rows for g in row) == list(range(200))
    assert all(sum(sizes[g] for g in row) <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // 64) + 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_flex_attention(family):
    """FlexAttention, which has no backward on a CPU, with a softcap and with a sliding window."""
    sizes = dict(hidden_size=64, head_dim=16)
    with torch.no_grad():
        expected = padded_logps(tiny(family, "eager", **sizes), ragged_groups())
        logps = shared_logps(tiny(family, "flex_attention", **sizes), ragged_groups())
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)


def test_labels_beside_inputs():
    """The form in which every label has a row of its own: against separate sequences, in values and gradients."""
    groups = [g | {"responses": [r for r in g["responses"] if r]} for g in ragged_groups()]
    results = []
    for shared in (False, True):
        model = tiny("gemma3", "sdpa")
        if shared:
            batch = labels_beside_inputs([(g["prompt"], g["responses"]) for g in groups])
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            logits = model(**inputs, attention_mask=attention_mask(model, batch), use_cache=False).logits[0]
            tokens = token_logprobs(logits, batch["labels"][0], shift=True)
            logps = torch.segment_reduce(tokens, "sum", offsets=batch["cu_seqlens"])
        else:
            logps = padded_logps(model, groups)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (expected, gradient), (logps, own) = results
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-5)
    assert (own - gradient).norm() <= 1e-5 * gradient.norm()


def test_more_reasons_are_named():
    """Virtual tokens before the prompt, statistics over a batch, models of other libraries."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "virtual tokens" in unsupported_reason(peft.get_peft_model(tiny("llama"), config))
    lora = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    check_shared_prompts(lora)
    model = tiny("llama")
    model.model.extra = torch.nn.BatchNorm1d(32)
    assert "batch normalisation" in unsupported_reason(model)
    assert "no model of transformers" in unsupported_reason(torch.nn.Linear(2, 2))
