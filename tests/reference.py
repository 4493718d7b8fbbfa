"""The operators' meaning written once more, in float64 and by other means: what the tests compare with."""

import torch


def transform(logits, temperature=1.0, softcap=None, logit_scale=1.0):
    """Logits as the softmax takes them, float64."""
    z = logits.double() * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(logits, labels, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100, shift=False):
    """Differentiable float64 log-probabilities by log_softmax."""
    all_logps = transform(logits, temperature, softcap, logit_scale).log_softmax(-1)
    scored = labels != ignore_index
    # Part of the graph even if no position is scored.
    result = torch.zeros(labels.shape, dtype=torch.float64, device=logits.device) + all_logps.flatten()[:0].sum()
    first = 1 if shift else 0
    for where in scored.nonzero().tolist():
        if where[-1] >= first:
            row = (*where[:-1], where[-1] - first)
            result[tuple(where)] = all_logps[(*row, labels[tuple(where)])]
    return result


def sequence_sums(values, lengths=None):
    """Sums of the rows of `[B, T]`, or of consecutive runs of the given lengths."""
    if lengths is None:
        return values.sum(-1)
    return torch.stack([part.sum() for part in values.split(lengths)])
