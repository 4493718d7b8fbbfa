"""Loading the model and its tokenizer, and adding a LoRA adapter."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from .config import ModelArguments


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a directory, a hub id or a .gguf file; it pads with its end token if it has no padding token."""
    name, options = _locate(source)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, dtype: str = "float32") -> PreTrainedModel:
    """Causal language model of a directory, a hub id or a .gguf file, whose weights are unpacked."""
    name, options = _locate(source)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **options)


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if path.suffix != ".gguf":
        return source, {}
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {source}")
    return str(path.parent), {"gguf_file": path.name}


def add_adapter(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
    """The model with a LoRA adapter to train in place of its weights, if `lora_rank` asks for one."""
    if not args.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    targets = args.lora_targets[0] if args.lora_targets == ["all-linear"] else args.lora_targets
    alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    config = LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return get_peft_model(model, config)  # type: ignore[return-value]


def base_model(model: nn.Module) -> Any:
    """The causal language model under its wrappers (DDP, PEFT)."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
