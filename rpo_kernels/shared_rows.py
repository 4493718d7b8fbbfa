"""Token level where rows are shared: several labels scored against one row of logits, which is not copied.

With `g_n = dL/dlogp_n` and S the labels of one row, the row's gradient is

    dL/dz = sum_{n in S} g_n onehot(y_n) - (sum_{n in S} g_n) softmax(z)

so one pass over the logits serves all labels: the row kernels see each row with one of its labels, the row's lead, and
the sum of the gradients, and the few entries at the labels are written afterwards. No atomics: the bits are the same in
every run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import INTEGER, check_device, check_tensor, checks_values
from ._registration import TOKEN_OPTIONS, register, register_overwriting, saves_without_hooks
from .kernels import dispatch, reference
from .kernels.interface import EntropyGrad, RowStats, TokenOptions
from .outputs import RequestedOutputs, TokenOutputs, pack, pack_empty


class Saved(NamedTuple):
    """What backward needs of forward: of N labels, and of T rows, each with its first label."""

    logps: Tensor  # [N]
    entropy: Tensor  # [N], of the labels' rows; empty if not asked for
    label_logits: Tensor  # [N]
    lead: Tensor  # [T] index of the row's lead; N for a row without labels
    row_logps: Tensor  # [T]
    max: Tensor  # [T]
    sumexp: Tensor  # [T]


def check_rows(name: str, shared: Tensor, rows: Tensor, labels: Tensor, shift: bool) -> None:
    """Check that `rows` says for each of the labels `[N]` which row of `shared` `[T, ...]` it is scored against.

    Raises:
        ValueError: naming `rows`, `labels`, `shift`, or the rows' argument by its `name`.
    """
    if shift:
        raise ValueError("rows names the row that predicts each label: it goes without shift=True")
    check_tensor("rows", rows, INTEGER)
    check_tensor("labels", labels, INTEGER)
    if labels.ndim != 1 or rows.shape != labels.shape:
        raise ValueError(f"rows and labels must be of one shape [N]; got {list(rows.shape)} and {list(labels.shape)}")
    if shared.ndim != 2:
        raise ValueError(f"{name} must be two-dimensional where rows is given; got shape {list(shared.shape)}")
    check_device("rows", rows, labels.device, "the labels'")
    check_device(name, shared, labels.device, "the labels'")
    if rows.numel() and checks_values(rows):
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= len(shared):
            raise ValueError(f"rows must lie in [0, {len(shared)}), the rows of {name}; got values {low} to {high}")


def take_rows(name: str, hidden: Tensor, rows: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """`hidden[rows]`, `[N, H]`, whose gradient is summed in a fixed order on every device; errors as `check_rows`."""
    check_rows(name, hidden, rows, labels, shift)
    return torch.nn.functional.embedding(rows, hidden)


def shared_token_logprobs(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    options: TokenOptions,
    asked: RequestedOutputs,
    inplace_backward: bool,
    backend: str | None,
) -> TokenOutputs:
    """`token_logprobs(logits[rows], labels)` for checked `[T, V]` logits and `[N]` labels, without copying logits."""
    *saved, others = shared_token_logprobs_op(
        *(logits, labels, rows.long()),
        **options._asdict(),
        inplace_backward=inplace_backward,
        outputs=asked.statistics,
        backend=backend,
    )
    results = Saved(*saved)
    return asked.unpack(results.logps, results.entropy, others, None)


def _first_labels(counted: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    index = torch.where(counted, torch.arange(len(rows), device=rows.device), len(rows))
    return index.new_full((num_rows,), len(rows)).scatter_reduce_(0, rows, index, "amin")


def _likeliest_labels(counted: Tensor, labels: Tensor, z: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The only ones that can be their rows' predictions: of the largest z, among equal ones of the first column."""
    values = z.masked_fill(~counted, -torch.inf)
    largest = values.new_full((num_rows,), -torch.inf).scatter_reduce_(0, rows, values, "amax")
    equal = counted & (values < largest[rows]).logical_not_()  # a NaN too
    columns = labels.long().masked_fill(~equal, torch.iinfo(torch.int64).max)
    first = columns.new_full((num_rows,), torch.iinfo(torch.int64).max).scatter_reduce_(0, rows, columns, "amin")
    return _first_labels(equal & (columns == first[rows]), rows, num_rows)


def _at(values: Tensor, index: Tensor, missing: float) -> Tensor:
    """`values[index]`; `missing` where the index is one past the end."""
    return torch.cat((values, values.new_full((1,), missing)))[index]


def _sum_by_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sums of `values` `[N]` by row, in a fixed order on every device: how an embedding sums its gradient."""
    return torch.ops.aten.embedding_dense_backward(values.unsqueeze(-1), rows, num_rows, -1, False).squeeze(-1)


def _sum_of_equal(values: Tensor, keys: Tensor) -> Tensor:
    """For each of `values` `[N]` the sum of all that have the same key."""
    ordered, order = keys.sort(stable=True)
    run = torch.cat((ordered.new_zeros(min(1, len(keys))), (ordered.diff() != 0).long())).cumsum(0)
    sums = _sum_by_row(values[order], run, len(keys))[run]
    return torch.empty_like(values).scatter_(0, order, sums)


def _slope(logits: Tensor, options: TokenOptions) -> Tensor | float:
    """`dz / dlogit`."""
    slope = options.logit_scale / options.temperature
    if options.softcap is None:
        return slope
    return reference.softcap_slope(logits, options.logit_scale / options.softcap).mul_(slope)


def _counted(logits: Tensor, labels: Tensor, options: TokenOptions) -> Tensor:
    """Which labels are scored; on an accelerator one out of range is not, its log-probability is -inf."""
    return (labels != options.ignore_index) & (labels >= 0) & (labels < logits.shape[1])


def _forward(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    inplace_backward: bool,
    outputs: Sequence[str],
    backend: str | None,
    **token_options: Any,
) -> tuple[Tensor, ...]:
    options = TokenOptions(**token_options)
    counted = _counted(logits, labels, options)
    label_logits = logits[rows, torch.where(counted, labels, 0).long()]
    label_logits = label_logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = reference.transform(label_logits, options)
    if "is_top1" in outputs:
        lead = _likeliest_labels(counted, labels, z, rows, len(logits))
    else:
        lead = _first_labels(counted, rows, len(logits))
    row_labels = _at(labels, lead, options.ignore_index)
    stats = dispatch.rows(logits, backend).row_stats(logits[None], row_labels[None], options, outputs=tuple(outputs))
    row_logps, top, sumexp = (x[0] for x in (stats.logp, stats.max, stats.sumexp))
    is_lead = lead[rows] == torch.arange(len(rows), device=rows.device)
    logps = torch.where(is_lead, row_logps[rows], z - top[rows] - sumexp[rows].log()).masked_fill(~counted, -torch.inf)
    logps = logps.masked_fill(labels == options.ignore_index, 0)
    entropy, outputs_of_labels = _of_labels(stats, outputs, logits.shape[1], labels, row_labels, rows, counted)
    return *Saved(logps, entropy, label_logits, lead, row_logps.clone(), top.clone(), sumexp.clone()), outputs_of_labels


def _of_labels(
    stats: RowStats,
    outputs: Sequence[str],
    vocab: int,
    labels: Tensor,
    row_labels: Tensor,
    rows: Tensor,
    counted: Tensor,
) -> tuple[Tensor, Tensor]:
    """Entropy `[N]` and the other outputs `[k, N]` of the labels' rows, empty where not asked for."""
    entropy, others = pack(stats, outputs, vocab)
    if "entropy" in outputs:
        entropy = torch.where(counted, entropy[0, rows], 0)
    if others.numel():
        others = torch.where(counted, others[:, 0, rows], 0)
        names = [name for name in outputs if name != "entropy"]
        if "is_top1" in names:
            others[names.index("is_top1")] *= labels == row_labels[rows]
    return entropy, others


def _write_grad(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    saved: Saved,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    options: TokenOptions,
    backend: str | None,
    out: Tensor | None,
) -> Tensor:
    counted = _counted(logits, labels, options)
    grad_logps = torch.where(counted, grad_logps, 0).to(saved.logps.dtype)
    of_rows = _sum_by_row(grad_logps, rows, len(logits))
    row_labels = _at(labels, saved.lead, options.ignore_index)
    stats = RowStats(*(x[None] for x in (saved.row_logps, saved.max, saved.sumexp, saved.row_logps)))
    of_entropies = None
    if grad_entropy is not None:
        factors = _sum_by_row(torch.where(counted, grad_entropy, 0), rows, len(logits))
        of_entropies = EntropyGrad(_at(saved.entropy, saved.lead, 0)[None], factors[None])
    grad = dispatch.rows(logits, backend).row_grad(
        *(logits[None], row_labels[None], stats, of_rows[None], options),
        out=None if out is None else out[None],
        entropy=of_entropies,
    )[0]
    # The entry at a label: g - G p = (g - G) + G (1 - p), exact also where p rounds to 1.
    of_labels = _sum_of_equal(grad_logps, rows * logits.shape[1] + torch.where(counted, labels, 0))
    sums = of_rows[rows]
    entries = of_labels - sums - sums * torch.expm1(saved.logps)
    if grad_entropy is not None:  # -p (log p + H) of the entropy; where p is 0 its logarithm does not matter
        entries -= factors[rows] * saved.logps.exp() * (saved.logps.clamp(min=-1e4) + saved.entropy)
    entries = entries * _slope(saved.label_logits, options)
    # A label that is not scored writes what its row's lead does, or 0 into a row of zeros.
    source = torch.where(counted, torch.arange(len(rows), device=rows.device), saved.lead[rows])
    grad[rows, _at(labels, source, 0).long()] = _at(entries, source, 0).to(grad.dtype)
    return grad


def _grad(
    logits: Tensor, labels: Tensor, rows: Tensor, saved: Sequence[Tensor], grad_logps: Tensor,
    grad_entropy: Tensor | None, *, backend: str | None, **options: Any,
) -> Tensor:  # fmt: skip
    arguments = (logits, labels, rows, Saved(*saved), grad_logps, grad_entropy, TokenOptions(**options))
    return _write_grad(*arguments, backend, None)


def _grad_(
    logits: Tensor, labels: Tensor, rows: Tensor, saved: Sequence[Tensor], grad_logps: Tensor,
    grad_entropy: Tensor | None, *, backend: str | None, **options: Any,
) -> None:  # fmt: skip
    arguments = (logits, labels, rows, Saved(*saved), grad_logps, grad_entropy, TokenOptions(**options))
    _write_grad(*arguments, backend, logits)


def _fake_forward(logits: Tensor, labels: Tensor, *_: Any, outputs: Sequence[str], **__: Any) -> tuple[Tensor, ...]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    logps, label_logits = (labels.new_empty(labels.shape, dtype=exact) for _ in range(2))
    row_logps, top, sumexp = (logits.new_empty(logits.shape[:1], dtype=exact) for _ in range(3))
    lead = labels.new_empty(logits.shape[:1], dtype=torch.int64)
    entropy, others = pack_empty(logps, outputs)
    return *Saved(logps, entropy, label_logits, lead, row_logps, top, sumexp), others


def _fake_grad(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple) -> None:
    ctx.options = dict(keyword_only_inputs)
    has_entropy = "entropy" in ctx.options.pop("outputs")
    ctx.overwrites = ctx.options.pop("inplace_backward") and saves_without_hooks()
    ctx.set_materialize_grads(False)
    _, entropy, *rest = output
    ctx.mark_non_differentiable(*rest, *(() if has_entropy else (entropy,)))
    ctx.save_for_backward(*inputs, *output[:-1])


def _backward(
    ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, None, None]:
    if grad_logps is None:
        if grad_entropy is None:
            return None, None, None
        grad_logps = torch.zeros_like(grad_entropy)
    logits, labels, rows, *saved = ctx.saved_tensors
    if ctx.overwrites and not torch.is_grad_enabled():
        shared_token_logprobs_grad_(logits, labels, rows, saved, grad_logps, grad_entropy, **ctx.options)
        return logits.detach(), None, None
    return shared_token_logprobs_grad(logits, labels, rows, saved, grad_logps, grad_entropy, **ctx.options), None, None


_SAVED = ", ".join(f"Tensor {name}" for name in Saved._fields)
_GRAD_INPUTS = (
    f"Tensor labels, Tensor rows, Tensor[] saved, Tensor grad_logps, Tensor? grad_entropy, *, {TOKEN_OPTIONS}, "
    "str? backend"
)

shared_token_logprobs_op = register(
    f"shared_token_logprobs(Tensor logits, Tensor labels, Tensor rows, *, {TOKEN_OPTIONS}, bool inplace_backward, "
    f"str[] outputs, str? backend) -> ({_SAVED}, Tensor others)",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
shared_token_logprobs_grad = register(
    f"shared_token_logprobs_grad(Tensor logits, {_GRAD_INPUTS}) -> Tensor", _grad, _fake_grad
)
shared_token_logprobs_grad_ = register_overwriting(
    f"shared_token_logprobs_grad_(Tensor(a!) logits, {_GRAD_INPUTS}) -> ()", _grad_
)
