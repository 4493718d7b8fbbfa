"""Outputs beside log-probabilities by plain torch, until the operators have them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...head import linear_token_logprobs as _linear


class TokenOutputs(NamedTuple):
    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def _outputs(z, labels, ignore, outputs, logps):
    scored = labels != ignore
    logp = z.log_softmax(-1)
    p = logp.exp()
    values = dict(
        entropy=-(p * logp.clamp(min=-1e30)).sum(-1),
        mean_logit=z.detach().mean(-1),
        is_top1=(z.argmax(-1) == labels).float(),
        log_sum_sq_probs=(2 * logp.detach()).logsumexp(-1),
    )
    return TokenOutputs(logps, **{k: torch.where(scored, v, 0) for k, v in values.items() if k in outputs})


def linear_token_logprobs(hidden, weight, labels, *, outputs=(), entropy_grad=True, **o):
    logps = _linear(hidden, weight, labels, **o)
    if not outputs:
        return logps
    z = hidden.float() @ weight.float().T
    if o.get("bias") is not None:
        z = z + o["bias"].float()
    z = z * o.get("logit_scale", 1)
    if o.get("softcap"):
        z = o["softcap"] * (z / o["softcap"]).tanh()
    return _outputs(z / o.get("temperature", 1), labels, o.get("ignore_index", -100), outputs, logps)
