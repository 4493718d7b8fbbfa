"""The reference backend: the row kernels in plain torch, against which every other backend is tested.

Runs on any device and in any floating dtype, float64 included, and is used where no faster backend is available.
"""

import torch
from torch import Tensor

from .interface import ActiveColumns, EntropyGrad, RowStats, TokenOptions


def transform(logits: Tensor, options: TokenOptions) -> Tensor:
    """`z = softcap * tanh(logit_scale * x / softcap) / temperature`, in float32 or better; a new tensor."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if options.softcap is None:
        return z.mul_(options.logit_scale / options.temperature)
    return z.mul_(options.logit_scale / options.softcap).tanh_().mul_(options.softcap / options.temperature)


def row_stats(
    logits: Tensor,
    labels: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    running: RowStats | None = None,
    outputs: tuple[str, ...] = (),
) -> RowStats:
    """Statistics of the rows of one tile of logits.

    Args:
        logits: `[B, T, v]`, columns `first_column ... first_column + v` of the vocabulary.
        labels: `[B, T]` integers, in the whole vocabulary's numbering.
        running: statistics of the columns before this tile, to be continued and overwritten in place.
        outputs: names in `OUTPUT_FIELDS` whose fields to compute too; ignored with `running`, which determines them.

    Returns:
        `RowStats` aligned with the labels.
    """
    z = transform(logits, options)
    target = labels_of_rows(labels, options)
    scored = target != options.ignore_index
    if running is not None:
        outputs = running.outputs

    top = z.amax(-1)
    column, inside = _label_column(z, target, first_column)
    label_logit = torch.where(inside, z.gather(-1, column), -torch.inf).squeeze(-1)
    sum_z = z.sum(-1) if "mean_logit" in outputs else None
    max_before_label = _max_before_label(z, target, first_column) if "is_top1" in outputs else None
    weights = z.sub_(_finite(top).unsqueeze(-1)).exp_()
    tile = RowStats(
        logp=torch.empty_like(top),
        max=top,
        sumexp=weights.sum(-1),
        label_logit=label_logit,
        sum_exp_z=torch.xlogy(weights, weights).sum(-1) if "entropy" in outputs else None,
        sum_z=sum_z,
        max_before_label=max_before_label,
        sum_sq_exp=weights.square().sum(-1) if "log_sum_sq_probs" in outputs else None,
    )
    if running is not None:
        tile = _merge(RowStats(*(None if x is None else _to_rows(x, options) for x in running)), tile)  # type: ignore
    tile = tile._replace(logp=(tile.label_logit - tile.max) - tile.sumexp.log())
    result = _unscored_blank(tile, scored, options)
    if running is None:
        return result
    for old, new in zip(running, result):
        if old is not None and new is not None:
            old.copy_(new)
    return running


def row_grad(
    logits: Tensor,
    labels: Tensor,
    stats: RowStats,
    grad_logps: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    out: Tensor | None = None,
    active: ActiveColumns | None = None,
    entropy: EntropyGrad | None = None,
) -> Tensor:
    """Gradient of the log-probabilities: `U = (onehot(label) - softmax(z)) * dz/dx * grad_logps`.

    Args:
        logits: `[B, T, v]`, columns `first_column ... first_column + v` of the vocabulary.
        stats: finished statistics of the whole rows (`logp`, `max` and `sumexp` are read).
        grad_logps: `[B, T]`, the factor of each label position.
        out: where to write, in any floating dtype, `logits` itself included; None for a new one of the logits' dtype.
        active: filled with the columns whose gradient, before it is rounded to `out`, exceeds a threshold anywhere or
            is NaN.
        entropy: the entropy's gradient, to be added.

    Returns:
        `out`; rows that no scored label reads are 0.
    """
    target = labels_of_rows(labels, options)
    logp, top, sumexp, factor = (_to_rows(x, options) for x in (stats.logp, stats.max, stats.sumexp, grad_logps))
    away = transform(logits, options).sub_(_finite(top).unsqueeze(-1))
    extra = None if entropy is None else _entropy_grad(away, sumexp, *(_to_rows(x, options) for x in entropy))
    unit = away.exp_().div_(-sumexp.unsqueeze(-1))
    # 1 - p of the label from its log-probability: exact also where p rounds to 1.
    column, inside = _label_column(unit, target, first_column)
    unit.scatter_(-1, column, torch.where(inside, -torch.expm1(logp).unsqueeze(-1), unit.gather(-1, column)))
    scale = options.logit_scale / options.temperature
    grad = unit.mul_(factor.to(unit.dtype).unsqueeze(-1) * scale)
    if extra is not None:
        grad.add_(extra, alpha=scale)
    if options.softcap is not None:
        grad.mul_(softcap_slope(logits, options.logit_scale / options.softcap))
    grad.masked_fill_((target == options.ignore_index).unsqueeze(-1), 0)
    if active is not None:
        active.mask.masked_fill_((grad.abs() <= active.threshold).logical_not_().flatten(0, -2).any(0), 1)
    return grad.to(logits.dtype).contiguous() if out is None else out.copy_(grad)


def labels_of_rows(labels: Tensor, options: TokenOptions) -> Tensor:
    """The label that each row of logits predicts: labels moved one to the left if `options.shift`."""
    return _to_rows(labels, options, options.ignore_index)


def _entropy_grad(away: Tensor, sumexp: Tensor, entropy: Tensor, factor: Tensor) -> Tensor:
    """`-p (log p + entropy) * factor` from `away = z - max`."""
    log_p = away - sumexp.log().unsqueeze(-1)
    # Where p is 0 in every dtype, its logarithm may be any finite number.
    return (
        log_p.clamp(min=-1e4).add_(entropy.unsqueeze(-1)).mul_(log_p.exp_()).mul_(-factor.to(away.dtype).unsqueeze(-1))
    )


def softcap_slope(logits: Tensor, scale: float) -> Tensor:
    """`1 - tanh(u)^2 = 1 / cosh(u)^2` at `u = scale * logits`: exact also where tanh rounds to 1."""
    u = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).mul_(scale)
    return u.cosh_().square_().reciprocal_()


def _finite(top: Tensor) -> Tensor:
    """The maximum of a row of -inf only is replaced by 0, so that its exponentials are 0."""
    return torch.where(top == -torch.inf, 0, top)


def _label_column(z: Tensor, target: Tensor, first_column: int) -> tuple[Tensor, Tensor]:
    """Where each row's label stands in the tile, `[B, T, 1]`, and whether it does."""
    column = (target.long() - first_column).unsqueeze(-1)
    return column.clamp(0, z.shape[-1] - 1), (column >= 0) & (column < z.shape[-1])


def _max_before_label(z: Tensor, target: Tensor, first_column: int) -> Tensor:
    """Each row's largest z in columns before the label's."""
    columns = torch.arange(first_column, first_column + z.shape[-1], device=z.device)
    return z.masked_fill(columns >= target.unsqueeze(-1), -torch.inf).amax(-1)


def _merge(a: RowStats, b: RowStats) -> RowStats:
    top = torch.maximum(a.max, b.max)
    # Each part's maximum relative to the new one; a part of -inf only has no weight.
    drops = [torch.where(part.sumexp > 0, part.max - _finite(top), 0) for part in (a, b)]
    merged = RowStats(
        logp=a.logp,
        max=top,
        sumexp=a.sumexp * drops[0].exp() + b.sumexp * drops[1].exp(),
        label_logit=torch.maximum(a.label_logit, b.label_logit),
    )
    if a.sum_exp_z is not None and b.sum_exp_z is not None:
        moved = [x + part.sumexp * drop for x, part, drop in zip((a.sum_exp_z, b.sum_exp_z), (a, b), drops)]
        merged = merged._replace(sum_exp_z=moved[0] * drops[0].exp() + moved[1] * drops[1].exp())
    if a.sum_z is not None and b.sum_z is not None:
        merged = merged._replace(sum_z=a.sum_z + b.sum_z)
    if a.max_before_label is not None and b.max_before_label is not None:
        merged = merged._replace(max_before_label=torch.maximum(a.max_before_label, b.max_before_label))
    if a.sum_sq_exp is not None and b.sum_sq_exp is not None:
        sum_sq_exp = a.sum_sq_exp * (2 * drops[0]).exp() + b.sum_sq_exp * (2 * drops[1]).exp()
        merged = merged._replace(sum_sq_exp=sum_sq_exp)
    return merged


def _unscored_blank(stats: RowStats, scored: Tensor, options: TokenOptions) -> RowStats:
    """Statistics of rows as statistics of label positions; unscored ones are 0, and 1 in `sumexp` and `sum_sq_exp`."""

    def blank(name: str, x: Tensor | None) -> Tensor | None:
        fill = 1.0 if name in ("sumexp", "sum_sq_exp") else 0.0
        return None if x is None else _to_labels(torch.where(scored, x, fill), fill, options)

    return RowStats(*(blank(name, x) for name, x in zip(RowStats._fields, stats)))  # type: ignore[arg-type]


def _to_rows(x: Tensor, options: TokenOptions, fill: float = 0.0) -> Tensor:
    """From label positions to the rows of logits that predict them."""
    if not options.shift:
        return x
    return torch.cat((x[:, 1:], x.new_full((x.shape[0], 1), fill)), -1)[:, : x.shape[1]]


def _to_labels(x: Tensor, fill: float, options: TokenOptions) -> Tensor:
    """From rows of logits to the label positions that they predict."""
    if not options.shift:
        return x
    return torch.cat((x.new_full((x.shape[0], 1), fill), x[:, :-1]), -1)[:, : x.shape[1]]
