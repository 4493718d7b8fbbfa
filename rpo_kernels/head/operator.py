"""Log-probabilities from hidden states and the LM head's weight, as a differentiable torch operator."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import INTEGER, check_device, check_shape, check_tensor
from .._registration import (
    TOKEN_OPTIONS,
    frees_saved,
    register,
    register_overwriting,
    saves_without_hooks,
)
from ..kernels.dispatch import check_backend
from ..kernels.interface import TokenOptions
from ..logprobs import check_label_range
from ..outputs import RequestedOutputs, TokenOutputs, pack_empty
from ..shared_rows import take_rows
from . import gemm
from .budget import parse_budget
from .dispatch import choose
from .plan import memory_plan
from .schedule import Needs, Saved, find_rows
from .tiles import Head

AUTO_THRESHOLD = 2.0**-20  # its error is a tenth of what rounding the gradient to half precision costs
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_SAVED = [f"Tensor {name}" for name in Saved._fields]


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    memory_budget: int | str | None = None,
    gradient_filter: float | Literal["auto"] | None = None,
    outputs: Sequence[str] = (),
    entropy_grad: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, labels, ...)` without materialising the logits.

    Positions that are not scored cost nothing. Half-precision operands are multiplied into float32 logits where the
    device can, and gradients are summed in float32 and rounded once. Under autocast, operands are cast as a linear
    layer's are.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        weight: `[V, H]` of the same dtype, the LM head or the tied embedding.
        labels: `[...]` integers in `[0, V)`, or `ignore_index` for positions that are not scored.
        bias: `[V]` of the same dtype.
        rows: `[N]` integers: label n is scored against row `rows[n]` of the hidden states `[T, H]`, so that several
            labels `[N]` share a row (see `rpo_kernels.shared_prompts`). Goes without `shift`.
        temperature, softcap, logit_scale, ignore_index, shift, backend: as in `token_logprobs`.
        memory_budget: what forward and backward may use beyond inputs, result and gradients: bytes, `"512MB"`, or None
            for a quarter of the device's free memory. See `memory_plan`: less memory costs up to one more head GEMM.
            The last bits of the weight's gradient depend on which tiles are saved; a fixed budget makes them
            reproducible whatever memory is free.
        gradient_filter: leave columns of the vocabulary out of the gradients of a chunk of rows if
            `|dlogp / dlogit|` is at most this in all its rows, for example `2**-16`; None is exact, `"auto"` is 2^-20
            for half precision, else None. Values are exact in any case. Only one byte per column and chunk is then
            saved for backward, which recomputes the remaining columns; on an accelerator it synchronises twice.
        outputs: names of further results, any of `"entropy"`, `"mean_logit"`, `"is_top1"`, `"log_sum_sq_probs"`
            and `"dropped"`, from the same logits.
        entropy_grad: whether the entropy may be differentiated. Its gradient costs one more head GEMM (none with a
            filter), and nothing is saved for backward; with False the entropy costs no head GEMM.

    Returns:
        Natural log-probabilities of the labels' shape, float32 (float64 for float64 inputs); 0 where not scored.
        Differentiable once in hidden, weight and bias. With `outputs`, a `TokenOutputs` that holds them as `logps`
        beside the outputs. Its `dropped` is, for each position, at least the sum of `|dlogp / dlogit|` over the
        columns left out (the softmax's mass on them, without a transform), so that the error in the position's hidden
        gradient is at most this, times its `|dL/dlogp|`, times the largest norm of a row of the weight.

    Raises:
        ValueError: for shapes, dtypes, devices, options or a budget that do not fit. Labels out of range as in
            `token_logprobs`.
    """
    if rows is not None:
        hidden = take_rows("hidden", hidden, rows, labels, shift)
    options = TokenOptions(logit_scale, softcap, temperature, ignore_index, shift)
    asked = RequestedOutputs.check(outputs)
    result = linear_token_outputs(
        *(hidden, weight, labels, bias, options, asked),
        entropy_grad=entropy_grad,
        memory_budget=memory_budget,
        gradient_filter=gradient_filter,
        backend=backend,
    )
    return result if outputs else result.logps  # type: ignore[return-value]


def linear_token_outputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: TokenOptions,
    asked: RequestedOutputs,
    *,
    entropy_grad: bool = False,
    memory_budget: int | str | None = None,
    gradient_filter: float | Literal["auto"] | None = None,
    backend: str | None = None,
) -> TokenOutputs:
    """`linear_token_logprobs` with its outputs."""
    options.check()
    _check_types(hidden, weight, bias, labels, backend)
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    _check(hidden, weight, bias, labels)
    gradient_filter = _threshold(gradient_filter, hidden.dtype)
    budget = None if memory_budget is None else parse_budget(memory_budget, hidden.device)
    grad = torch.is_grad_enabled()
    logps, dropped, entropy, others, *_ = linear_token_logprobs_op(
        hidden.flatten(0, -2),
        weight,
        bias,
        labels.flatten(0, -2) if labels.ndim > 1 else labels[None],
        **options._asdict(),
        needs_hidden=grad and hidden.requires_grad,
        needs_weight=grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        memory_budget=budget,
        inplace_backward=weight.requires_grad and not torch.compiler.is_compiling() and saves_without_hooks(),
        gradient_filter=gradient_filter,
        outputs=asked.statistics,
        entropy_grad=entropy_grad,
        backend=backend,
    )
    return asked.unpack(logps.reshape(labels.shape), entropy, others, dropped)


def _threshold(gradient_filter: float | Literal["auto"] | None, dtype: torch.dtype) -> float | None:
    if gradient_filter == "auto":
        return AUTO_THRESHOLD if dtype.itemsize == 2 else None
    if gradient_filter is None or (isinstance(gradient_filter, int | float) and gradient_filter >= 0):
        return gradient_filter
    raise ValueError(f'gradient_filter must be a number of at least 0, "auto" or None; got {gradient_filter!r}')


def _autocast(x: Tensor) -> Tensor:
    """Cast as autocast casts the operands of a linear layer."""
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check_types(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, backend: str | None) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name != "bias" or bias is not None:
            check_tensor(name, x)
    check_tensor("labels", labels, INTEGER)
    check_backend(backend)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, H] with V of at least one; got shape {list(weight.shape)}")
    if hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be [..., {weight.shape[1]}] as weight is; got shape {list(hidden.shape)}")
    check_shape("labels", labels, hidden.shape[:-1], "the shape of hidden without its last dimension,")
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], "one number for each row of weight,")
    for name, other in (("weight", weight), ("bias", bias), ("labels", labels)):
        if other is not None:
            check_device(name, other, hidden.device, "the hidden states'")
        if other is not None and name != "labels" and other.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the hidden states' dtype {hidden.dtype}; got {other.dtype}")


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    memory_budget: int | None,
    inplace_backward: bool,
    gradient_filter: float | None,
    outputs: Sequence[str],
    entropy_grad: bool,
    backend: str | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    vocab, width = weight.shape
    check_label_range(labels, vocab, options["ignore_index"])
    budget = parse_budget(memory_budget, hidden.device)  # while the device may still be busy
    rows = find_rows(labels, TokenOptions(**options))
    head = Head(hidden, weight, bias, TokenOptions(**options), backend)
    differentiable = needs_hidden or needs_weight
    needs = Needs(
        needs_hidden,
        needs_weight,
        threshold=gradient_filter if differentiable else None,
        outputs=tuple(outputs),
        entropy=entropy_grad and differentiable and "entropy" in outputs,
    )
    plan = memory_plan(
        len(rows.positions),
        width,
        vocab,
        hidden.dtype,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        positions=labels.numel(),
        memory_budget=budget,
        gradient_filter=needs.threshold,
        softcap=options["softcap"],
        outputs=outputs,
        entropy_grad=entropy_grad,
        device=hidden.device,
        backend=head.backend_name,
        weight_aligned=head.aligned,
        inplace_backward=inplace_backward,
    )
    with gemm.whole_sums(hidden.device.type, hidden.dtype):
        result = choose(head, needs).forward(head, rows, plan, needs)

    def of_positions(scored: Tensor) -> Tensor:
        return scored.new_zeros(labels.numel()).index_copy_(0, rows.positions, scored).view(labels.shape)

    logps, dropped = of_positions(result.logps), of_positions(result.dropped)
    values = dict(zip(outputs, map(of_positions, result.outputs), strict=True))
    entropy = values.pop("entropy", logps.new_empty(0))
    others = torch.stack([*values.values()]) if values else logps.new_empty(0)
    return logps, dropped, entropy, others, *result.saved


def _grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    saved: list[Tensor],
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    gradient_filter: float | None,
    outputs: Sequence[str],
    entropy_grad: bool,
    backend: str | None,
    inplace: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, TokenOptions(**options), backend)
    has_entropy = entropy_grad and "entropy" in outputs
    needs = Needs(needs_hidden, needs_weight, needs_bias, gradient_filter, tuple(outputs), has_entropy, inplace)
    with gemm.whole_sums(hidden.device.type, hidden.dtype):
        return choose(head, needs).backward(head, Saved(*saved), labels, grad_logps, grad_entropy, needs)


def _grad_(
    grad_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    saved: list[Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    options |= dict(needs_weight=True, inplace=True)
    everything = [*Saved(*saved)._replace(grad_weight=grad_weight)]
    gradients = _grad(hidden, weight, bias, labels, grad_logps, grad_entropy, everything, **options)
    return gradients[0], gradients[2]


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, outputs: Sequence[str], **_: Any
) -> tuple[Tensor, ...]:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    rows = _unknown_size(labels.numel())
    logps = labels.new_empty(labels.shape, dtype=exact)
    return (
        logps,
        torch.empty_like(logps),
        *pack_empty(logps, outputs),
        *Saved(
            positions=labels.new_empty(rows, dtype=torch.int64),
            stats=hidden.new_empty(_unknown_size(4), rows, dtype=exact),
            references=hidden.new_empty(_unknown_size(0), rows, dtype=exact),
            grad_hidden=hidden.new_empty(_unknown_size(0), hidden.shape[1], dtype=exact),
            kept=hidden.new_empty(_unknown_size(0)),
            grad_weight=hidden.new_empty(_unknown_size(0), hidden.shape[1]),
            active=hidden.new_empty(_unknown_size(0), dtype=torch.uint8),
            schedule=hidden.new_empty(_unknown_size(9), dtype=torch.int64, device="cpu"),
        ),
    )


def _unknown_size(without_symbols: int) -> Any:
    """A size that data decide: a symbol, or the number given where there are none (meta tensors, or a FakeTensorMode
    on its own)."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except RuntimeError:
        return without_symbols


def _fake_grad(
    hidden: Tensor,
    weight: Tensor,
    *_: Any,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[:1]) if needs_bias else weight.new_empty(0),
    )


def _fake_grad_(grad_weight: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    grad_hidden, _, grad_bias = _fake_grad(*tensors, **options, needs_weight=False)
    return grad_hidden, grad_bias


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    _, dropped, entropy, others, *saved = output
    not_read = ("needs_hidden", "needs_weight", "memory_budget", "inplace_backward")
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name not in not_read}
    has_entropy = ctx.options["entropy_grad"] and "entropy" in ctx.options["outputs"]
    ctx.inplace = keyword_only_inputs["inplace_backward"] and saves_without_hooks()  # whoever calls the operator
    ctx.mark_non_differentiable(dropped, others, *saved, *(() if has_entropy else (entropy,)))
    ctx.set_materialize_grads(False)  # no zeros of the saved tensors' size
    ctx.save_for_backward(*inputs, *saved)


def _backward(ctx: Any, grad_logps: Tensor | None, _dropped: None, grad_entropy: Tensor | None, *_: Any) -> tuple:
    if grad_logps is None:
        if grad_entropy is None:
            return None, None, None, None
        grad_logps = torch.zeros_like(grad_entropy)
    hidden, weight, bias, labels, *saved = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
    inputs = hidden, weight, bias, labels, grad_logps, grad_entropy
    options = dict(ctx.options, needs_hidden=needs_hidden, needs_bias=needs_bias)
    grad_weight = Saved(*saved).grad_weight
    if ctx.inplace and needs_weight and frees_saved(grad_weight) and len(grad_weight):
        others = Saved(*saved)._replace(grad_weight=grad_weight.new_empty(0))
        grad_hidden, grad_bias = linear_token_logprobs_grad_(grad_weight, *inputs, [*others], **options)
        gradients = grad_hidden, grad_weight.detach(), grad_bias
    else:
        gradients = linear_token_logprobs_grad(*inputs, saved, **options, needs_weight=needs_weight)
    return *(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad)), None


linear_token_logprobs_op = register(
    f"linear_token_logprobs({_HEAD}, *, {TOKEN_OPTIONS}, bool needs_hidden, bool needs_weight, int? memory_budget, "
    "bool inplace_backward, float? gradient_filter, str[] outputs, bool entropy_grad, str? backend)"
    f" -> (Tensor logps, Tensor dropped, Tensor entropy, Tensor others, {', '.join(_SAVED)})",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
_GRAD_INPUTS = (
    f"{_HEAD}, Tensor grad_logps, Tensor? grad_entropy, Tensor[] saved, *, {TOKEN_OPTIONS}, "
    "bool needs_hidden, bool needs_bias, float? gradient_filter, str[] outputs, bool entropy_grad, str? backend"
)
linear_token_logprobs_grad = register(
    f"linear_token_logprobs_grad({_GRAD_INPUTS}, bool needs_weight) -> (Tensor hidden, Tensor weight, Tensor bias)",
    _grad,
    _fake_grad,
)
linear_token_logprobs_grad_ = register_overwriting(
    f"linear_token_logprobs_grad_(Tensor(a!) grad_weight, {_GRAD_INPUTS}) -> (Tensor hidden, Tensor bias)",
    _grad_,
    _fake_grad_,
)
