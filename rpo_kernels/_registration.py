"""Registration of the package's operators with torch: schema, implementation, fake tensors, gradient.

Gradients are operators too. Graphs that torch.compile caches on disk then contain calls instead of this package's
formulas, so that a graph compiled before an upgrade does not mix the old backward with the new forward.

For operators written in Python, torch's dispatcher takes longer than the kernels of a small batch. In eager mode, where
it would only call the implementation, an `Operator` calls it directly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# `TokenOptions` as operator arguments.
TOKEN_OPTIONS = "float logit_scale, float? softcap, float temperature, int ignore_index, bool shift"

_library = torch.library.Library("rpo_kernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


def _differentiable_once(ctx: Any, *_: Any) -> None:
    raise RuntimeError("rpo_kernels operators are differentiable once; their gradient has no gradient of its own")


class Operator:
    """`torch.ops.rpo_kernels.<name>`, called with its tensors in order and everything else by keyword."""

    def __init__(self, name: str, implementation: Callable, function: type[torch.autograd.Function] | None):
        self.overload = getattr(torch.ops.rpo_kernels, name).default
        self.implementation = implementation
        self.function = function

    def __call__(self, *tensors: Tensor | Sequence[Tensor] | None, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*tensors, **options)
        if not _is_eager(tensors):
            _refuse_forward_mode(tensors)
            return self.overload(*tensors, **options)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
            return self.implementation(*tensors, **options)
        if self.function is None:
            return self.overload(*tensors, **options)
        return self.function.apply(options, *tensors)  # type: ignore[no-untyped-call]


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    backward: Callable = _differentiable_once,
    setup_context: Callable | None = None,
) -> Operator:
    """Define an operator for every device.

    Args:
        schema: name, tensors, then everything else after `*`, and results.
        backward: from the context and the results' gradients to a tuple of the tensors' gradients.
        setup_context: called with the context, the tensors, the other arguments as a dictionary, and the results.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rpo_kernels::{name}", fake, lib=_library)
    torch.library.register_autograd(f"rpo_kernels::{name}", backward, setup_context=setup_context, lib=_library)
    function = None if setup_context is None else _function(name, implementation, setup_context, backward)
    return Operator(name, implementation, function)


def register_overwriting(schema: str, implementation: Callable, fake: Callable | None = None) -> Callable:
    """Define an operator that overwrites its first argument; `fake` gives its results, if any, for fake tensors.

    Each call increments the version of the overwritten tensor, also when traced, so that autograd raises an error for
    operators that saved it before.
    """
    name, _, rest = schema.partition("(")
    overwritten = rest.split(",")[0].split()[-1]
    operator = torch.library.custom_op(
        f"rpo_kernels::{name}", implementation, mutates_args=(overwritten,), schema="(" + rest
    )
    if fake is not None:
        operator.register_fake(fake)
    return operator


def saves_without_hooks() -> bool:
    """Whether autograd saves tensors without hooks, and checks their versions when they are unpacked.

    Under hooks for saved tensors (activation checkpointing, `save_on_cpu`) it may give the same memory to several
    operators and checks no version. Hooks that are registered on a node after forward are not seen.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def frees_saved(saved: Tensor) -> bool:
    """Whether the running backward pass is eager and frees this tensor that forward saved, so that nothing reads it
    later: not under `retain_graph` or `create_graph`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_eager([saved], profiled=True):
        return False
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # private: torch may rename it
    return keeps is not None and not keeps()


def _function(
    name: str, implementation: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The autograd function that `torch.library.register_autograd` makes of both functions, without the dispatcher."""

    def forward(ctx: Any, options: dict[str, Any], *tensors: Any) -> Any:
        ctx.tensor_count = len(tensors)
        output = implementation(*tensors, **options)
        setup_context(ctx, tensors, options, output)
        return output

    def with_options(ctx: Any, *grads: Tensor | None) -> tuple:
        # Without the options; in a second backward it is already shortened.
        ctx.needs_input_grad = ctx.needs_input_grad[-ctx.tensor_count :]
        return None, *backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(with_options)}
    return type(name, (torch.autograd.Function,), members)


def _is_eager(tensors: Sequence[Any], profiled: bool = False) -> bool:
    """Whether these are ordinary tensors, and no mode, transform or (unless `profiled`) profiler must see the call."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and (profiled or not torch.autograd._profiler_enabled())
        and forward_ad._current_level < 0
        and all(_is_plain(x) for x in tensors)
    )


def _refuse_forward_mode(tensors: Sequence[Any]) -> None:
    """torch's dispatcher would call the operator without the tangents: their result would silently be 0."""
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("rpo_kernels operators have no forward-mode derivative, only backward")


def _is_plain(x: Any) -> bool:
    if isinstance(x, Tensor):
        return type(x) in _PLAIN and not x.is_meta
    return x is None or all(map(_is_plain, x))
