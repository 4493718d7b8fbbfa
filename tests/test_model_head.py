"""Tiny models of many families: our head on their hidden states against their own logits, and the loss from both."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rpo_kernels import DPO  # noqa: E402
from rpo_kernels.integrations.model_head import check_head, find_head  # noqa: E402
from rpo_kernels.train.loss_layer import LossLayer, preference_loss, response_logps  # noqa: E402

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {},
    "Gemma2": dict(final_logit_softcapping=0.02),
    "Gemma3Text": dict(final_logit_softcapping=0.03),
    "Cohere": dict(logit_scale=0.3),
    "Granite": dict(logits_scaling=5.0),
    "MiniCPM3": dict(
        dim_model_base=8, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
    ),
    "HyperCLOVAX": dict(logits_scaling=0.3),
    "FalconH1": dict(lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=4),
    "Phi3": {},
    "Phi": {},  # its head has a bias
}


def tiny(family, **config):
    torch.manual_seed(0)
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | config))
    return getattr(transformers, name)(config)


def batch():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 97, (4, 9), generator=generator)
    labels = input_ids.clone()
    labels[:, :3] = -100
    return dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        labels=labels,
        rewards=torch.tensor([1.0, 0.0, 0.5, -1.0]),
        ref_logps=-torch.rand(4, generator=generator) * 30,
        group_sizes=[2, 2],
        logits_to_keep=7,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_both_levels_agree(family):
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():  # a softcap and a bias that matter
            parameter.add_(0.02 * torch.randn_like(parameter))
    check_head(model)
    results = {}
    for source in ("logits", "head"):
        model.zero_grad()
        output = preference_loss(model, batch(), DPO(), LossLayer(source))
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[source] = output.loss.detach(), response_logps(model, batch(), LossLayer(source)), gradients
    (loss, logps, gradients), (expected_loss, expected_logps, expected) = results["head"], results["logits"]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


def test_lora_with_a_frozen_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny("Llama"), config)
    check_head(model)
    a, b = (preference_loss(model, batch(), DPO(), LossLayer(source)).loss for source in ("head", "logits"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert find_head(model).weight.requires_grad is False


def lora(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return peft.get_peft_model(tiny("Llama"), config)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["lm_head", "q_proj"]),
        dict(target_modules=["lm_head"], lora_bias=True),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["adapted", "adapted with a bias", "trained whole"],
)
def test_a_head_that_peft_trains(options):
    """From both comes the same loss and gradients, with the adapter and without, and the adapter matters."""
    model = lora(**options)
    if "modules_to_save" in options:
        with torch.no_grad():
            find_head(model).weight.mul_(2)
    results = {}
    for source in ("logits", "head"):
        model.zero_grad()
        loss = preference_loss(model, batch(), DPO(), LossLayer(source)).loss
        loss.backward()
        with model.disable_adapter():
            reference = response_logps(model, batch(), LossLayer(source))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[source] = loss.detach(), response_logps(model, batch(), LossLayer(source)), reference, gradients
    *values, gradients = results["head"]
    *expected_values, expected = results["logits"]
    torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == expected.keys() and any("lm_head" in name for name in gradients)
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name
    assert (values[1] - values[2]).abs().max() > 0.01


@pytest.mark.parametrize(
    "options, cast, match",
    [
        (dict(target_modules=["lm_head"], lora_dropout=0.1), None, "dropout"),
        (dict(target_modules=["lm_head"], use_dora=True), None, "DoRA"),
        (dict(target_modules=["lm_head"]), torch.bfloat16, "rounding"),
    ],
    ids=["dropout", "dora", "half precision"],
)
def test_an_adapter_that_cannot_be_merged_is_refused(options, cast, match):
    model = lora(**options)
    if cast is not None:
        model.to(cast)
    with pytest.raises(ValueError, match=match):
        find_head(model)


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="virtual tokens"):
        find_head(peft.get_peft_model(tiny("Llama"), config))


def test_the_scale_of_muse_glimmer():
    """Too large a family to build here: its text config, on a Llama."""
    if not hasattr(transformers, "MuseGlimmerTextConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no MuseGlimmerTextConfig")
    model = tiny("Llama")
    model.config = transformers.MuseGlimmerTextConfig(output_multiplier=0.25, final_logit_softcapping=7.0)
    assert find_head(model)[3:] == (0.25, 7.0)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="logit scale"):
        find_head(tiny("Cohere", logit_scale=0.0))


def test_the_models_own_forward_is_back_afterwards():
    model = tiny("Llama")
    preference_loss(model, batch(), DPO(), LossLayer("head"))
    assert "forward" not in model.__dict__ and model(input_ids=batch()["input_ids"]).logits.shape == (4, 9, 97)


def test_a_head_that_is_not_as_its_config_tells_is_found_out():
    model = tiny("Llama")
    model.register_forward_hook(lambda *args: transformers.modeling_outputs.CausalLMOutput(logits=args[2].logits + 1))
    with pytest.raises(ValueError, match="in a way that its config does not describe"):
        check_head(model)
    assert LossLayer.of(model).source == "logits"
    with pytest.raises(ValueError):
        LossLayer.of(model, "head")


def test_a_head_that_is_not_linear_is_refused():
    model = tiny("Llama")
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ValueError, match="no plain linear output embedding"):
        find_head(model)
