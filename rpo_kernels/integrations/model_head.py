"""LM heads of transformers models: the backbone, and the parameters that turn its hidden states into logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ModelHead(NamedTuple):
    """The LM head of a model: `logits = softcap(logit_scale * (hidden @ weight.T + bias))`."""

    backbone: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `linear_token_logprobs` and `linear_rpo_loss` that describe the head."""
        return dict(weight=self.weight, bias=self.bias, logit_scale=self.logit_scale, softcap=self.softcap)


def find_head(model: nn.Module) -> ModelHead:
    """The head of a causal language model of transformers, which may be a PEFT model.

        head = find_head(model)
        hidden = head.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logps = linear_token_logprobs(hidden, labels=labels, shift=True, **head.arguments)

    Softcap (Gemma 2, 3) and logit scale (Cohere, Falcon-H1, Granite, MiniCPM3, HyperCLOVA X, Muse) come from the
    model's config. `check_head` tests whether these suffice.

    With a PEFT model, the head depends on the active adapter, so call this once per forward: the trained copy if
    the head is one of `modules_to_save`, the original with adapters switched off, and the weight plus the adapter's
    product where LoRA adapts the head in float32. The weight of a head that is not trained requires no gradient, which
    saves a third of the work.

    Raises:
        ValueError: if the model has no plain linear output embedding, if its config gives a scale that is not
            positive, or if its adapter cannot be merged into the head without changing what it computes: dropout,
            DoRA and other variants, half precision (a small product would be rounded away), prompt learning.
    """
    if hasattr(model, "get_base_model"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(model).__name__} prepends virtual tokens, so hidden states and labels do not align: "
                "use the logits instead"
            )
        model = model.get_base_model()  # type: ignore[operator]
    embedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    backbone = getattr(model, "base_model", model)
    if backbone is model:
        embedding = None
    weight, bias = _linear(embedding, type(model).__name__)
    scale, softcap = _transform(model.config.get_text_config())  # type: ignore[union-attr, operator]
    return ModelHead(backbone, weight, bias, scale, softcap)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare `find_head` with the model's own logits for three tokens.

    Raises:
        ValueError: if the model computes its logits differently, or `find_head` raises.
    """
    head = find_head(model)
    training = model.training
    model.eval()
    try:
        input_ids = torch.arange(1, 4, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
        expected = model(input_ids=input_ids).logits.float()
        hidden = head.backbone(input_ids=input_ids).last_hidden_state
        logits = head.logit_scale * nn.functional.linear(hidden, head.weight, head.bias).float()
    finally:
        model.train(training)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if logits.shape != expected.shape or (logits - expected).norm() > 0.02 * expected.norm():
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way that its config does not describe: "
            "use the logits instead"
        )


def _transform(config: Any) -> tuple[float, float | None]:
    """Logit scale and softcap from a text config."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is not None:
            # Granite and MiniCPM3 divide by logits_scaling, HyperCLOVA X multiplies.
            divides = name == "logits_scaling" and not config.model_type.startswith("hyperclovax")
            scale = 1 / value if divides and value else value
            break
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"the logit scale must be a positive finite number, but the model's config gives {scale!r}")
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _linear(embedding: Any, model: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an output embedding as its active adapter, if any, makes it."""
    if hasattr(embedding, "modules_to_save"):  # PEFT's trained copies of a module
        off = embedding.disable_adapters or not embedding.active_adapters
        embedding = embedding.original_module if off else embedding.modules_to_save[embedding.active_adapters[0]]
    if type(embedding) is nn.Linear:
        return embedding.weight, embedding.bias
    if hasattr(embedding, "lora_A") and type(embedding.get_base_layer()) is nn.Linear:
        return _merged(embedding)
    raise ValueError(
        f"{model} has no plain linear output embedding (found {type(embedding).__name__}): use the logits instead"
    )


def _merged(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of PEFT's LoRA layer with its active adapters, differentiable in the adapters."""
    base = layer.get_base_layer()
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return base.weight, base.bias
    weight, bias = base.weight, base.bias
    _check_mergeable(layer, active, weight)
    for name in active:
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
        if layer.lora_B[name].bias is not None:
            shift = layer.lora_B[name].bias * layer.scaling[name]
            bias = shift if bias is None else bias + shift
    return weight, bias


def _check_mergeable(layer: Any, active: list[str], weight: Tensor) -> None:
    def refuse(what: str) -> None:
        raise ValueError(
            f"the LoRA adapter on the LM head has {what}, so it cannot be merged into the head's weight: leave the "
            "head out of target_modules, train it whole with modules_to_save, or use the logits instead"
        )

    variants = [name for name in active if name in getattr(layer, "lora_variant", {}) or layer.use_dora.get(name)]
    if variants:
        refuse(f"a variant of LoRA (such as DoRA) in {variants}")
    if any(isinstance(layer.lora_dropout[name], nn.Dropout) for name in active):
        refuse("dropout")
    compute = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        compute = torch.get_autocast_dtype(weight.device.type)
    if compute.itemsize < 4:
        refuse(f"a weight computed in {compute}, whose rounding may be larger than the adapter's product")
