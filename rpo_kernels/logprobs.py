"""Token level: log-probabilities of labels under logits, as a differentiable torch operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import INTEGER, check_device, check_shape, check_tensor, checks_values
from ._registration import TOKEN_OPTIONS, register, register_overwriting, saves_without_hooks
from .kernels import dispatch
from .kernels.interface import EntropyGrad, RowStats, TokenOptions
from .outputs import RequestedOutputs, pack, pack_empty
from .shared_rows import check_rows, shared_token_logprobs


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    inplace_backward: bool = False,
    outputs: Sequence[str] = (),
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each label under `softmax(softcap * tanh(logit_scale * logits / softcap) / temperature)`.

    Args:
        logits: `[..., V]`, float32, bfloat16, float16 or float64. Rows may be strided; a copy is made only if V is not
            the fastest dimension.
        labels: `[...]` integers in `[0, V)`, or `ignore_index` for positions that are not scored.
        rows: `[N]` integers: label n is scored against row `rows[n]` of the logits `[T, V]`, so that several labels
            `[N]` share a row (see `rpo_kernels.shared_prompts`). No logits are copied. Goes without `shift`.
        temperature, softcap, logit_scale: positive; softcap None means none (Gemma 2 uses 30, arXiv 2408.00118).
        shift: labels align with the input ids (Hugging Face convention): logits at `t - 1` are scored against
            `labels[..., t]`, and position 0 is not scored. Nothing is copied.
        inplace_backward: the gradient overwrites the logits' memory, in eager mode and compiled. Other operators
            that saved the logits then raise autograd's error about modified tensors in backward, and so does a second
            backward under `retain_graph`. Where autograd does not check versions, under hooks for saved tensors
            (non-reentrant checkpoint, `save_on_cpu`), and with `create_graph`, the gradient has its own memory. Rows
            must not share memory (`expand`, `as_strided`).
        outputs: names of further results, any of `"entropy"`, `"mean_logit"`, `"is_top1"`, `"log_sum_sq_probs"`
            and `"dropped"` (0 here), from the same pass over the logits.
        backend: `"triton"`, `"native"`, `"torch"`, or None for the fastest one on the logits' device.

    Returns:
        Natural log-probabilities of the labels' shape, float32 (float64 for float64 logits); 0 where not scored.
        Differentiable once in `logits`. Logits of any finite size are taken exactly, but where `backend="torch"` rounds
        `logit_scale / temperature * logits` to float32 like any other operator: beyond 1e9 in size, logits one step of
        float32 apart may count as equal there. With `outputs`, a `TokenOutputs` that holds them as `logps`
        beside the outputs; its `entropy` is differentiable too.

    Properties, which tests/fuzz checks: a row's result depends on no other row, to the bit (the torch backend: to
    rounding); the gradient is linear in that of the log-probabilities; columns may be permuted together with the
    labels; without a softcap, a row's gradient sums to 0.

    Raises:
        ValueError: for shapes, dtypes, devices or options that do not fit. Labels out of range raise on the CPU; on an
            accelerator they give -inf without a synchronisation, and raise if RPO_KERNELS_CHECK=1 is set.
    """
    options = TokenOptions(logit_scale, softcap, temperature, ignore_index, shift)
    options.check()
    asked = RequestedOutputs.check(outputs)
    _check(logits, labels, rows, shift)
    dispatch.check_backend(backend)
    if inplace_backward:
        _check_no_overlap(logits)
    if rows is not None:
        check_label_range(labels, logits.shape[-1], ignore_index)
        shared = shared_token_logprobs(logits, labels, rows, options, asked, inplace_backward, backend)
        return shared if outputs else shared.logps  # type: ignore[return-value]
    # [..., T, V] and [..., T] as [B, T, V] and [B, T]; views wherever strides allow.
    batches = logits.flatten(0, -3) if labels.ndim > 1 else logits.unsqueeze(0)
    targets = labels.flatten(0, -2) if labels.ndim > 1 else labels.unsqueeze(0)
    logps, _, _, entropy, others = token_logprobs_op(
        *(batches, targets),
        **options._asdict(),
        inplace_backward=inplace_backward,
        outputs=asked.statistics,
        backend=backend,
    )
    if labels.ndim != 2:
        logps = logps.squeeze(0) if labels.ndim == 1 else logps.view(labels.shape)
    return asked.unpack(logps, entropy, others, None) if outputs else logps  # type: ignore[return-value]


def check_label_range(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError for a label outside `[0, vocab)`; on an accelerator only if RPO_KERNELS_CHECK=1 is set."""
    if labels.numel() == 0 or not checks_values(labels):
        return
    scored = torch.where(labels == ignore_index, 0, labels)
    low, high = int(scored.min()), int(scored.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"labels must lie in [0, {vocab}) or equal ignore_index ({ignore_index}); got values from {low} to {high}"
        )


def _check(logits: Tensor, labels: Tensor, rows: Tensor | None, shift: bool) -> None:
    check_tensor("logits", logits)
    check_tensor("labels", labels, INTEGER)
    if labels.ndim == 0:
        raise ValueError("labels must have at least one dimension, got a scalar")
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one, [..., V]; got shape {list(logits.shape)}")
    if rows is None:
        check_shape("labels", labels, logits.shape[:-1], "the shape of logits without its last dimension,")
    else:
        check_rows("logits", logits, rows, labels, shift)
    check_device("labels", labels, logits.device, "the logits'")


def _check_no_overlap(logits: Tensor) -> None:
    """Elements are apart if each stride is longer than all that the strides below it reach."""
    strides = [(stride, size) for stride, size in zip(logits.stride(), logits.shape) if size > 1]
    for i, (longer, _) in enumerate(strides):
        below = [stride * (size - 1) for j, (stride, size) in enumerate(strides) if j != i and stride <= longer]
        if longer <= sum(below):
            raise ValueError(
                f"inplace_backward=True needs logits whose rows do not share memory; got shape {list(logits.shape)} "
                f"with strides {list(logits.stride())}"
            )


def _forward(
    logits: Tensor,
    labels: Tensor,
    *,
    inplace_backward: bool,
    outputs: Sequence[str],
    backend: str | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    kernels = dispatch.rows(logits, backend)
    stats = kernels.row_stats(logits, labels, TokenOptions(**options), outputs=tuple(outputs))
    # A label out of range has the log-probability of a column that is not there.
    if labels.numel() and checks_values(labels) and not stats.logp.min().item() > -torch.inf:
        check_label_range(labels, logits.shape[-1], options["ignore_index"])
    results = (stats.logp, stats.max, stats.sumexp, *pack(stats, outputs, logits.shape[-1]))
    return tuple(x.contiguous() for x in results)  # as the fake ones, whatever the strides of the logits


def _fake_forward(logits: Tensor, labels: Tensor, *, outputs: Sequence[str], **_: Any) -> tuple[Tensor, ...]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    stats = [labels.new_empty(labels.shape, dtype=exact) for _ in range(3)]
    return *stats, *pack_empty(stats[0], outputs)


def _grad(
    logits: Tensor,
    labels: Tensor,
    saved: Sequence[Tensor],
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    *,
    backend: str | None,
    **options: Any,
) -> Tensor:
    return _row_grad(logits, labels, saved, grad_logps, grad_entropy, backend, TokenOptions(**options), None)


def _grad_(
    logits: Tensor,
    labels: Tensor,
    saved: Sequence[Tensor],
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    *,
    backend: str | None,
    **options: Any,
) -> None:
    _row_grad(logits, labels, saved, grad_logps, grad_entropy, backend, TokenOptions(**options), logits)


def _row_grad(
    logits: Tensor,
    labels: Tensor,
    saved: Sequence[Tensor],
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    backend: str | None,
    options: TokenOptions,
    out: Tensor | None,
) -> Tensor:
    logps, top, sumexp, entropy = saved
    return dispatch.rows(logits, backend).row_grad(
        *(logits, labels, RowStats(logps, top, sumexp, label_logit=logps), grad_logps, options),
        out=out,
        entropy=None if grad_entropy is None else EntropyGrad(entropy, grad_entropy),
    )


def _fake_grad(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple) -> None:
    logps, top, sumexp, entropy, others = output
    ctx.options = dict(keyword_only_inputs)
    has_entropy = "entropy" in ctx.options.pop("outputs")
    ctx.overwrites = ctx.options.pop("inplace_backward") and saves_without_hooks()
    ctx.set_materialize_grads(False)  # or zeros would be made for max and sumexp
    ctx.mark_non_differentiable(top, sumexp, others, *(() if has_entropy else (entropy,)))
    ctx.save_for_backward(*inputs, logps, top, sumexp, entropy)


def _backward(
    ctx: Any, grad_logps: Tensor | None, _top: None, _sumexp: None, grad_entropy: Tensor | None, _others: None
) -> tuple[Tensor | None, None]:
    if grad_logps is None:
        if grad_entropy is None:
            return None, None
        grad_logps = torch.zeros_like(grad_entropy)
    logits, labels, *saved = ctx.saved_tensors
    if ctx.overwrites and not torch.is_grad_enabled():
        token_logprobs_grad_(logits, labels, saved, grad_logps, grad_entropy, **ctx.options)
        return logits.detach(), None
    return token_logprobs_grad(logits, labels, saved, grad_logps, grad_entropy, **ctx.options), None


_GRAD_INPUTS = (
    f"Tensor labels, Tensor[] saved, Tensor grad_logps, Tensor? grad_entropy, *, {TOKEN_OPTIONS}, str? backend"
)

token_logprobs_op = register(
    f"token_logprobs(Tensor logits, Tensor labels, *, {TOKEN_OPTIONS}, bool inplace_backward, str[] outputs, "
    "str? backend) -> (Tensor logps, Tensor max, Tensor sumexp, Tensor entropy, Tensor others)",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
token_logprobs_grad = register(f"token_logprobs_grad(Tensor logits, {_GRAD_INPUTS}) -> Tensor", _grad, _fake_grad)
token_logprobs_grad_ = register_overwriting(f"token_logprobs_grad_(Tensor(a!) logits, {_GRAD_INPUTS}) -> ()", _grad_)
