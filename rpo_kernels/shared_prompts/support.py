"""Models that support shared prompts: a token's state depends only on its position and the tokens it attends to."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .batch import SharedPromptCollator
from .masks import IMPLEMENTATIONS, attention_mask, layer_kinds

# Small groups to test a model with: prompts and responses of one token, ragged, with a common first part.
_PROBE: list[dict[str, Any]] = [
    {"prompt": [5, 9, 2, 7, 4], "responses": [[3, 8, 6, 1], [2], [3, 8, 9]], "rewards": [0.0] * 3},
    {"prompt": [6], "responses": [[4, 4, 1], [7, 3]], "rewards": [0.0] * 2},
]
# Tolerated difference of the two forms, relative to the difference of logits between rows.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def unsupported_reason(model: nn.Module, longest: int | None = None) -> str | None:
    """Why shared prompts are not exact for a model, by its configuration; None if no reason is found.

    Args:
        model: a causal language model of transformers; may be wrapped by PEFT or DDP.
        longest: tokens of the longest prompt and response, for rotary embeddings that depend on it.
    """
    model = getattr(model, "module", model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its PEFT adapter puts virtual tokens before the prompt"
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return f"{type(model).__name__} is no model of transformers"
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    try:
        layer_kinds(config)
    except ValueError as error:
        return str(error)
    return _of_config(config, longest) or _of_modules(model, config)


def _of_config(config: Any, longest: int | None) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "its attention is not causal"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its attention is biased by the distance of places (ALiBi)"
    if "local" in getattr(config, "attention_layers", ()):
        return "its local attention counts places, not positions"
    if getattr(config, "output_router_logits", False):
        return "its auxiliary loss of experts counts tokens (output_router_logits)"
    rope = getattr(config, "rope_parameters", None) or {}
    for scheme in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        trained = scheme.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        changes = scheme.get("rope_type") in ("dynamic", "longrope")
        if changes and longest is not None and trained is not None and longest > trained:
            return f"its rotary embedding changes with the longest of a batch beyond {trained} tokens"
    return None


def _of_modules(model: nn.Module, config: Any) -> str | None:
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        usable = " or ".join(IMPLEMENTATIONS)
        return f"its attention implementation {implementation!r} takes no mask of this form ({usable} does)"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return "its batch normalisation counts tokens"
    return None


@torch.no_grad()
def check_shared_prompts(model: nn.Module, longest: int | None = None) -> None:
    """Compare shared prompts with separate sequences on a few tokens, whatever the configuration says.

    Args:
        model, longest: as for `unsupported_reason`. The model is run twice, in evaluation mode.

    Raises:
        ValueError: saying why the model cannot share prompts.
    """
    reason = unsupported_reason(model, longest)
    if reason is None:
        training = model.training
        model.eval()
        try:
            reason = _difference(_shared_logits(model), _separate_logits(model))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = f"it does not take rows of shared prompts ({type(error).__name__}: {error})"
        finally:
            model.train(training)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot share prompts: {reason}")


def _shared_logits(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    batch = SharedPromptCollator()(_PROBE)
    batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, attention_mask=attention_mask(model, batch), use_cache=False).logits
    return logits[0, batch["label_rows"]]


def _separate_logits(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    logits = []
    for group in _PROBE:
        prompt = group["prompt"]
        for response in group["responses"]:
            input_ids = torch.tensor([prompt + response], device=device)
            logits.append(model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1])
    return torch.cat(logits)


def _difference(shared: Tensor, separate: Tensor) -> str | None:
    tolerance = _TOLERANCE[separate.dtype]
    shared, separate = shared.double(), separate.double()
    difference = ((shared - separate).norm() / (separate - separate.mean(0)).norm()).item()
    if difference <= tolerance:
        return None
    return f"on a test of a few tokens its logits differ by {difference:.1e} of their spread (at most {tolerance:.0e})"
