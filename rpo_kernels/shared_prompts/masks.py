"""The attention of shared prompts, through transformers' own masking interface.

transformers makes the mask of each attention implementation (SDPA, eager, FlexAttention) from one function of the
query's and the key's index. Here that function describes a row of trees; the finished mask is passed to the model as
`attention_mask`, so that no part of transformers is replaced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MaskFunction = Callable[[Any, Any, Any, Any], Any]
# Attention implementations of transformers that take an arbitrary mask.
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def tree_mask_function(visible_until: Tensor) -> MaskFunction:
    """Mask of rows of trees: a query attends to itself and to the keys before it whose branch has not ended.

    Args:
        visible_until: `[B, T]`, see `TreeRow`.

    Returns:
        A function `(batch, head, query, key) -> bool` as transformers' masking interface and FlexAttention take it.
    """

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < visible_until[batch, key])

    return mask


def layer_mask_function(visible_until: Tensor, position_ids: Tensor, kind: str, width: int | None) -> MaskFunction:
    """`tree_mask_function` for a kind of layer: full, or local by distance in the sequence, not in the row.

    Args:
        visible_until, position_ids: `[B, T]`.
        kind: `"full_attention"`, `"sliding_attention"` or `"chunked_attention"`.
        width: tokens of the sliding window or of a chunk.
    """
    tree = tree_mask_function(visible_until)
    if kind == "full_attention":
        return tree
    assert width is not None

    def sliding(batch: Any, head: Any, query: Any, key: Any) -> Any:
        near = position_ids[batch, key] > position_ids[batch, query] - width
        return tree(batch, head, query, key) & near

    def chunked(batch: Any, head: Any, query: Any, key: Any) -> Any:
        same = position_ids[batch, key] // width == position_ids[batch, query] // width
        return tree(batch, head, query, key) & same

    return {"sliding_attention": sliding, "chunked_attention": chunked}[kind]


def attention_mask(model: nn.Module, batch: dict[str, Any]) -> Any:
    """What a causal language model of transformers takes as `attention_mask` for a batch of `SharedPromptCollator`.

    Args:
        model: may be wrapped by PEFT or DDP. Its attention is SDPA, eager or FlexAttention.
        batch: of `SharedPromptCollator`, on the model's device.

    Returns:
        Whatever the model's attention implementation works with, `[1, 1, T, T]`: a boolean mask (SDPA), an additive
        one (eager) or a block mask (FlexAttention). A dict of them by kind of layer if the model has several.

    Raises:
        ValueError: if the model has layers or an attention implementation for which there is no such mask.
    """
    model = getattr(model, "module", model)
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr]
    kinds = layer_kinds(config)
    masks = {kind: _mask(config, batch, kind, width, dtype) for kind, width in kinds.items()}
    # Every model takes one finished mask for all layers; a dict is only known to those with several kinds.
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_kinds(config: Any) -> dict[str, int | None]:
    """The kinds of attention in a model's layers, and how wide the local ones are.

    Raises:
        ValueError: naming a kind of layer that cannot share a prompt.
    """
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    widths = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"]
    unknown = sorted(set(kinds) - set(widths))
    if unknown:
        raise ValueError(f"it has {' and '.join(unknown)} layers")
    return {kind: widths[kind] for kind in sorted(set(kinds))}


def _mask(config: Any, batch: dict[str, Any], kind: str, width: int | None, dtype: torch.dtype) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"its attention implementation {name!r} takes no mask of this form: use {IMPLEMENTATIONS}")
    visible_until = batch["visible_until"]
    rows, tokens = visible_until.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[name](
        batch_size=rows,
        q_length=tokens,
        kv_length=tokens,
        q_offset=0,
        kv_offset=0,
        mask_function=layer_mask_function(visible_until, batch["position_ids"], kind, width),
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        device=visible_until.device,
    )
