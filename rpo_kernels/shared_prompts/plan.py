"""What a training step costs with shared prompts and with separate padded sequences."""

from typing import Any, NamedTuple

from torch import nn


class StepSize(NamedTuple):
    """How much of each kind of work a step holds."""

    tokens: int  # that the backbone computes, padding included
    pairs: int  # of query and key that dense attention computes, a head and layer
    scored: int  # rows of the LM head

    def __add__(self, other: "StepSize") -> "StepSize":  # type: ignore[override]
        return StepSize(*(a + b for a, b in zip(self, other, strict=True)))


def shared_size(prompt: int, responses: list[int]) -> StepSize:
    """A group alone in a row: the prompt and its responses once, without padding."""
    tokens = prompt + sum(responses)
    return StepSize(tokens, tokens**2, sum(responses))


def padded_size(prompt: int, responses: list[int]) -> StepSize:
    """The same group as separate sequences, padded to the longest."""
    length = prompt + max(responses)
    return StepSize(len(responses) * length, len(responses) * length**2, sum(responses))


def step_flops(model: nn.Module, size: StepSize) -> float:
    """Floating-point operations of forward and backward of all weights: products and attention, three passes each.

    Args:
        model: a causal language model of transformers, without an adapter.
        size: of the step.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
    return 6 * (weights * size.tokens + head.weight.numel() * size.scored + attention * size.pairs)
