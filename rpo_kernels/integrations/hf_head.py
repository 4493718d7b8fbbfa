"""transformers models at the head level: the backbone's hidden states, and how the model makes logits of them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class ModelHead(NamedTuple):
    """The LM head of a model: `logits = softcap(logit_scale * (hidden @ weight.T + bias))`."""

    backbone: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def find_head(model: nn.Module) -> ModelHead:
    """The head of a causal language model of transformers, which may be a PEFT model.

    Softcap (Gemma 2), logit scale (Cohere) and its inverse (Granite) come from the model's config. Whether the config
    tells all is for `check_head` to find out.

    Raises:
        ValueError: if the model has no plain linear output embedding.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    embedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    backbone = getattr(model, "base_model", model)
    if type(embedding) is not nn.Linear or backbone is model:
        raise ValueError(
            f"{type(model).__name__} has no plain linear output embedding (found {type(embedding).__name__}): "
            "use the logits level"
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return ModelHead(backbone, embedding.weight, embedding.bias, scale / divisor, softcap)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Hold `find_head` against the model's own logits for three tokens.

    Raises:
        ValueError: if the model makes its logits in another way, or `find_head` raises.
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
            f"{type(model).__name__} makes its logits in a way its config does not tell: use the logits level"
        )
