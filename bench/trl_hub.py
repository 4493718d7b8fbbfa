"""Tiny models and TRL's test data in folders with the names that TRL's tests give them.

In that folder as working directory, `from_pretrained("trl-internal-testing/...")` and `load_dataset` find them without
a hub. Models are those of TRL's scripts/generate_tiny_models with a byte-level tokenizer; the data are what TRL's
scripts/generate_*_dataset.py write.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from torch import nn

ORGANIZATION = "trl-internal-testing"
SIZES = dict(
    hidden_size=8,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
# Name after "tiny-": class, settings beside SIZES, chat template in trl/chat_templates.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen2ForCausalLM-2.5": ("Qwen2", {}, "qwen2_5"),
    "Qwen3ForCausalLM": ("Qwen3", dict(head_dim=4), "qwen3"),
    "Qwen3MoeForCausalLM": ("Qwen3Moe", dict(num_experts=4, head_dim=4, **EXPERTS), "qwen3"),
    "GptOssForCausalLM": ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=4), "gptoss"),
    "LlamaForCausalLM-3": ("Llama", {}, "llama3"),
    "LlamaForCausalLM-3.1": ("Llama", {}, "llama3_1"),
    "LlamaForCausalLM-3.2": ("Llama", dict(tie_word_embeddings=True), "llama3_2"),
    "MistralForCausalLM-0.1": ("Mistral", {}, ""),
    "MistralForCausalLM-0.2": ("Mistral", {}, ""),
    "GemmaForCausalLM": ("Gemma", dict(head_dim=4), "gemma"),
    "Gemma2ForCausalLM": ("Gemma2", dict(head_dim=4), "gemma"),
    "CohereForCausalLM": ("Cohere", dict(logit_scale=0.0625), "cohere"),
    "Cohere2ForCausalLM": ("Cohere2", dict(logit_scale=0.25), "cohere2"),
    "Phi3ForCausalLM": ("Phi3", {}, "phi3"),
    "Phi3ForCausalLM-3": ("Phi3", {}, "phi3"),
    "Phi3ForCausalLM-3.5": ("Phi3", {}, "phi3_5"),
    "GPTNeoXForCausalLM": ("GPTNeoX", {}, ""),
    "Glm4MoeForCausalLM": ("Glm4Moe", dict(n_routed_experts=4, head_dim=2, **EXPERTS), "glm4moe"),
    "DeepseekV3ForCausalLM": ("DeepseekV3", dict(num_attention_heads=2), "deepseekv3"),
    "DeepseekV3ForCausalLM-0528": ("DeepseekV3", dict(num_attention_heads=2), "deepseek_r1_distill"),
    "Olmo3ForCausalLM": ("Olmo3", {}, ""),
    "Lfm2ForCausalLM": ("Lfm2", dict(full_attn_idxs=[1], block_multiple_of=8), "lfm2"),
    "T5ForConditionalGeneration": ("T5", dict(d_ff=32, d_kv=4, decoder_start_token_id=0), ""),
    "Qwen2ForSequenceClassification-2.5": ("Qwen2", dict(num_labels=1), "qwen2_5"),
    "Qwen3ForSequenceClassification": ("Qwen3", dict(num_labels=1, head_dim=4), "qwen3"),
    "LlamaForSequenceClassification-3.2": ("Llama", dict(num_labels=1), "llama3_2"),
}
DATA = ("zen", "toolcall", "harmony")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_hub(folder: Path, checkout: Path, dtype: torch.dtype) -> None:
    """Write everything below `folder`, from the scripts of a checkout of TRL; its own tiny models are in bfloat16."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    home = folder / ORGANIZATION
    if (home / "complete").exists():
        return
    for name, (family, settings, template) in MODELS.items():
        path = checkout / "trl" / "chat_templates" / f"{template}.jinja"
        tokenizer = make_tokenizer(path.read_text() if path.exists() else CHAT)
        try:
            model = make_model(name, family, settings, tokenizer, dtype)
        except (AttributeError, TypeError, ValueError) as error:  # another version of transformers
            warnings.warn(f"no {name}: {error}", stacklevel=1)
            continue
        for part in (model, tokenizer):
            part.save_pretrained(home / f"tiny-{name}")
    for name in DATA:
        script = checkout / "scripts" / f"generate_{name}_dataset.py"
        if script.exists():  # TRL 0.24 has one less
            make_data(home / name, script)
    (home / "complete").touch()


def make_tokenizer(template: str) -> transformers.PreTrainedTokenizerFast:
    """One token for each byte, and the special ones of Qwen."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL[:3]))
    core.add_tokens(list(SPECIAL[3:]))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(
    name: str, family: str, settings: dict[str, Any], tokenizer: Any, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """Initialised as TRL's tiny models are."""
    transformers.set_seed(0)
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = getattr(transformers, f"{family}Config")(**(SIZES | dict(vocab_size=len(tokenizer)) | special | settings))
    kind = name.split("For", 1)[1].split("-")[0]
    model = getattr(transformers, f"{family}For{kind}")(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return model.to(dtype=dtype)


def make_data(folder: Path, script: Path) -> None:
    """One configuration of the dataset for each `push_to_hub` of the script."""
    specification = importlib.util.spec_from_file_location(script.stem, script)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    listed = ["---", "configs:"]

    def write(data: datasets.DatasetDict, _: str, config_name: str) -> None:
        listed.extend([f"- config_name: {config_name}", "  data_files:"])
        for split, rows in data.items():
            rows.to_parquet(folder / config_name / f"{split}.parquet")
            listed.extend([f"  - split: {split}", f"    path: {config_name}/{split}.parquet"])

    own, datasets.DatasetDict.push_to_hub = datasets.DatasetDict.push_to_hub, write
    try:
        module.main(test_size=0.1, push_to_hub=True, repo_id=folder.name)
    finally:
        datasets.DatasetDict.push_to_hub = own
    (folder / "README.md").write_text("\n".join([*listed, "---", ""]), encoding="utf-8")
