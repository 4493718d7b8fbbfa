"""Tiny random models of many families, whose local attention is shorter than the tests' sequences."""

import torch
import transformers as hf

WINDOW = 6
_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2Config, dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)),
    "qwen3": (hf.Qwen3Config, dict(head_dim=8)),
    "gemma2": (hf.Gemma2Config, dict(head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0)),
    "gemma3": (hf.Gemma3TextConfig, dict(head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2)),
    "mistral": (hf.MistralConfig, dict(head_dim=8, sliding_window=WINDOW)),
    "phi3": (hf.Phi3Config, dict(sliding_window=WINDOW)),
    "granite": (hf.GraniteConfig, dict(logits_scaling=2.0, residual_multiplier=0.5)),
    "cohere": (hf.CohereConfig, {}),
    "cohere2": (hf.Cohere2Config, dict(sliding_window=WINDOW)),
    "gpt_neox": (hf.GPTNeoXConfig, {}),
    "gpt_oss": (hf.GptOssConfig, dict(head_dim=8, sliding_window=WINDOW, rope_parameters=None) | _EXPERTS),
    "mixtral": (hf.MixtralConfig, _EXPERTS),
    "gpt2": (hf.GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "llama4": (hf.Llama4TextConfig, dict(head_dim=8, attention_chunk_size=8, intermediate_size_mlp=64) | _EXPERTS),
    "bloom": (hf.BloomConfig, dict(n_layer=2, n_head=4)),
    "mamba": (hf.MambaConfig, {}),
    "gpt_neo": (
        hf.GPTNeoConfig,
        dict(num_layers=2, num_hidden_layers=2, attention_types=[[["global", "local"], 1]], window_size=4),
    ),
}


def tiny(family: str, attention: str = "eager", **changes) -> hf.PreTrainedModel:
    """A model of the family in evaluation mode, with weights large enough that what a token sees matters."""
    torch.manual_seed(0)
    make, own = _FAMILIES[family]
    config = make(**(_SIZES | own | changes))
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model.eval()
