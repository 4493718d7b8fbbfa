"""How the package's operators are registered with torch: schema, implementation, fake tensors, gradient.

Gradients are operators too. What torch.compile keeps on disk then holds calls and none of this package's formulas, so
that a graph compiled before an upgrade does not mix the old backward with the new forward.
"""

from collections.abc import Callable
from typing import Any

import torch

# `TokenOptions` as operator arguments.
TOKEN_OPTIONS = "float logit_scale, float? softcap, float temperature, int ignore_index, bool shift"

_library = torch.library.Library("rpo_kernels", "FRAGMENT")


def _differentiable_once(ctx: Any, *_: Any) -> None:
    raise RuntimeError("rpo_kernels operators are differentiable once; their gradient has no gradient of its own")


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    backward: Callable | None = _differentiable_once,
    setup_context: Callable | None = None,
) -> None:
    """Define `torch.ops.rpo_kernels.<name>` for every device. `backward=None` is for operators that mutate."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rpo_kernels::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"rpo_kernels::{name}", backward, setup_context=setup_context, lib=_library)
