"""What the public operators mean, in float64 and plain loops; written from their formulas, without the package."""

import math

import torch
from torch import Tensor


def scored_rows(labels: Tensor, ignore_index: int, shift: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(position of the label, row of logits that predicts it) of each scored label."""
    pairs = []
    for position in (labels != ignore_index).nonzero().tolist():
        row = [*position[:-1], position[-1] - shift]
        if row[-1] >= 0:
            pairs.append((tuple(position), tuple(row)))
    return pairs


def token_outputs(logits, labels, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100, shift=False):
    """Log-probability, entropy, mean logit, is-top-1 and log sum of squared probabilities of each label position."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    z = z / temperature
    names = ("logps", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    zero = logits.flatten()[:0].sum()  # a graph even where nothing is scored
    results = {name: torch.zeros(labels.shape, dtype=torch.float64) + zero for name in names}
    for position, row in scored_rows(labels, ignore_index, shift):
        x, label = z[row], int(labels[position])
        logs = x - x.logsumexp(-1)
        some = logs > -math.inf
        results["logps"][position] = logs[label]
        results["entropy"][position] = -(logs[some].exp() * logs[some]).sum()
        results["mean_logit"][position] = x.mean()
        results["is_top1"][position] = float(x[label] == x.max() and not (x[:label] == x[label]).any())
        results["log_sum_sq_probs"][position] = (2 * logs).logsumexp(-1)
    return results


def group_loss(a: Tensor, rewards: Tensor, family: dict) -> Tensor:
    """Loss of one group of K responses with implicit rewards `a`, before the margin gamma is taken off."""
    count = len(a)
    if count == 1:
        return a.sum() * 0
    best = (rewards == rewards.max()).double()
    a = a - family.get("gamma", 0.0) * best
    margin = family.get("target_margin")
    b = family.get("eta", 1.0) * rewards if margin is None else margin * best if margin < math.inf else None
    if family["distance"] == "sq":
        d = a - b
        terms = [(d[k] - (d.sum() - d[k]) / (count - 1)) ** 2 for k in range(count)]
        return sum(terms) / (2 * count)
    log_p = a - a.logsumexp(0)
    log_q = (best / best.sum()).log() if b is None else b - b.logsumexp(0)
    log_from, log_to = (log_q, log_p) if family["distance"] == "bwd_kl" else (log_p, log_q)
    terms = [log_from[k].exp() * (log_from[k] - log_to[k]) for k in range(count) if log_from[k] > -math.inf]
    return sum(terms)


def sequence_sums(values: Tensor, labels: Tensor, bounds, weights, ignore_index: int, shift: bool):
    """Weighted sums and numbers of scored tokens of the sequences, given as lists of positions."""
    sums, lengths = [], []
    for positions in bounds:
        total, length = torch.zeros((), dtype=torch.float64), 0
        for first, position in enumerate(positions):
            if int(labels[position]) == ignore_index or (shift and first == 0):
                continue
            total = total + values[position] * (1.0 if weights is None else weights[position])
            length += 1
        sums.append(total)
        lengths.append(length)
    return torch.stack(sums), lengths


def preference_loss(logps, refs, lengths, rewards, members, family):
    """Mean loss, group losses, accuracy and margin, from sequence sums and the members of each group."""
    ratios = [logps[i] - (0 if refs is None else refs[i]) for i in range(len(logps))]
    if family.get("length_normalize"):
        ratios = [x / max(length, 1) for x, length in zip(ratios, lengths)]
    implicit = family.get("beta", 0.1) * torch.stack(ratios)
    losses = [group_loss(implicit[list(group)], rewards[list(group)], family) for group in members]
    agree, pairs, spreads = 0.0, 0, []
    for group in members:
        ordered = [(i, j) for i in group for j in group if rewards[i] > rewards[j]]
        pairs += len(ordered)
        agree += sum(1.0 if implicit[i] > implicit[j] else 0.5 if implicit[i] == implicit[j] else 0 for i, j in ordered)
        if ordered:
            best = max(group, key=lambda i: float(rewards[i]))
            worst = min(group, key=lambda i: float(rewards[i]))
            spreads.append(float(implicit[best] - implicit[worst]))
    losses = torch.stack(losses)
    accuracy = agree / pairs if pairs else math.nan
    return losses.mean(), losses, implicit, accuracy, sum(spreads) / len(spreads) if spreads else math.nan
