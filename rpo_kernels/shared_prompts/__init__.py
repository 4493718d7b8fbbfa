"""Shared prompts: a prompt and its K responses in one row, each token computed once. See docs/shared-prompts.md."""

from .batch import SharedPromptCollator, labels_beside_inputs
from .masks import attention_mask, tree_mask_function
from .packing import pack_by_tokens
from .support import check_shared_prompts, unsupported_reason

__all__ = [
    "SharedPromptCollator",
    "attention_mask",
    "check_shared_prompts",
    "labels_beside_inputs",
    "pack_by_tokens",
    "tree_mask_function",
    "unsupported_reason",
]
