"""Loading the model and its tokenizer, and its LoRA adapter."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import RunError
from .settings import ModelArguments

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a directory, a hub id or a .gguf file; it pads with its end token if it has no padding token.

    Raises:
        RunError: if there is none, or it cannot be read.
    """
    name, options = _locate(source)
    if (base := adapter_base(source)) and not (Path(source) / "tokenizer_config.json").exists():
        return load_tokenizer(base)
    tokenizer = _load(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(name, **options))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str) -> PreTrainedConfig:
    """Configuration of the model at `source`, or of the base model of an adapter.

    Raises:
        RunError: if there is none, or it cannot be read.
    """
    if base := adapter_base(source):
        return load_config(base)
    name, options = _locate(source)
    config = _load(source, "model", lambda: AutoConfig.from_pretrained(name, **options))
    if not options and quantised_by(config) == "gguf":
        # What a model unpacked from a .gguf file was saved with: its weights are not packed.
        del config.quantization_config
    return config


def load_model(source: str, dtype: str = "float32") -> PreTrainedModel:
    """Causal language model of a directory, a hub id or a .gguf file, whose weights are unpacked.

    An adapter is merged into its base model.

    Raises:
        RunError: if there is none, or it cannot be read.
    """
    if base := adapter_base(source):
        merged = _with_adapter(load_model(base, dtype), source, trainable=False).merge_and_unload()  # type: ignore[operator]
        return merged.requires_grad_(True)  # PEFT had frozen it
    name, options = _locate(source)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["config"] = load_config(source)
    load = AutoModelForCausalLM.from_pretrained
    model = _load(source, "model", lambda: load(name, dtype=getattr(torch, dtype), **options))
    if quantised_by(model.config) == "gguf":
        del model.config.quantization_config
    return model


def adapter_base(source: str) -> str | None:
    """The base model of a LoRA adapter's directory; None if `source` is not one."""
    path = Path(source) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if not base:
        raise RunError(f"{source} is a LoRA adapter that does not name its base model (base_model_name_or_path)")
    return base


def load_policy(args: ModelArguments, output: Path) -> PreTrainedModel:
    """The model to train, dropout off if asked, with the adapter to train if there is one.

    Args:
        args: what the user asked for, checked by `preflight`.
        output: where the base of a new adapter is written, if it is a merged model that exists nowhere else.
    """
    source = str(args.model)
    if args.adapter == "continue":
        base = load_model(str(adapter_base(source)), args.dtype)
        if args.disable_dropout:
            disable_dropout(base)
        return _with_adapter(base, source, trainable=True)
    model = load_model(source, args.dtype)
    if args.disable_dropout:
        disable_dropout(model)
    if args.lora_rank and args.adapter == "merge":
        model.save_pretrained(output / "base")
        model.name_or_path = str(output / "base")
    return add_adapter(model, args)


def add_adapter(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
    """The model with a LoRA adapter to train in place of its weights, if `lora_rank` asks for one.

    Raises:
        RunError: if the model has no such modules, or LoRA cannot adapt them.
    """
    if not args.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    targets = args.lora_targets[0] if args.lora_targets == ["all-linear"] else args.lora_targets
    alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    config = LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RunError(f"LoRA cannot adapt {args.lora_targets} of {type(model).__name__}: {error}") from error


def disable_dropout(model: nn.Module) -> None:
    """Switch off all dropout and router noise in training; the model's config keeps its values."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise RunError if a model's logits at a token depend on later tokens, as an encoder's do (BERT)."""
    ids = torch.arange(1, 7, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    others = torch.cat([ids[:, :-1], ids[:, :1]], -1)
    training = model.training
    model.eval()
    try:
        logits, changed = (model(input_ids=x).logits[:, :-1].float() for x in (ids, others))
    except RuntimeError as error:
        raise RunError(f"{type(base_model(model)).__name__} fails on a few tokens: {error}") from error
    finally:
        model.train(training)
    rounding = (
        1e-4 if model.dtype in (torch.float32, torch.float64) else 1e-2
    )  # experts' rounding depends on the other tokens
    if (logits - changed).norm() > rounding * logits.norm():
        raise RunError(
            f"{type(base_model(model)).__name__} is not causal: its logits depend on later tokens, so it cannot give a "
            "response's log-probability"
        )


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, in a fraction of a second.

    Raises:
        RunError: if it is no causal language model.
    """
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
        except ValueError as error:
            raise RunError(f"{config.model_type} is not a causal language model that transformers knows") from error


def base_model(model: nn.Module) -> Any:
    """The causal language model under its wrappers (DDP, PEFT)."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _with_adapter(base: PreTrainedModel, source: str, trainable: bool) -> PreTrainedModel:
    from peft import PeftModel

    load = PeftModel.from_pretrained
    return _load(source, "adapter", lambda: load(base, source, is_trainable=trainable))  # type: ignore[arg-type, return-value]


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if path.suffix != ".gguf":
        return source, {}
    if not path.is_file():
        raise RunError(f"no model file at {source}")
    return str(path.parent), {"gguf_file": path.name}


def _load(source: str, what: str, load: Callable[[], Loaded]) -> Loaded:
    """The result of `load`; exceptions of other libraries become a RunError about the files of `source`."""
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"cannot load the {what} of {source}: {reason[:400]}") from error


def quantised_by(config: PreTrainedConfig) -> str | None:
    """Which method the model's weights are packed with, by its config."""
    quantisation = getattr(config, "quantization_config", None)
    method = (
        quantisation.get("quant_method")
        if isinstance(quantisation, dict)
        else getattr(quantisation, "quant_method", None)
    )
    return None if method is None else str(getattr(method, "value", method))
