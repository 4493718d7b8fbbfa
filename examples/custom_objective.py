"""An objective of your own: any function of `[groups, K]` tensors; autograd gives its gradient."""

import torch

from rpo_kernels import rpo_loss


def hinge(log_ratios, rewards, present):
    """The best response's log-ratio must lead the worst one's by 1. `present` marks the responses of ragged groups."""
    present = torch.ones_like(rewards, dtype=torch.bool) if present is None else present
    best = rewards.masked_fill(~present, -torch.inf).argmax(-1, keepdim=True)
    worst = rewards.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
    lead = log_ratios.gather(-1, best) - log_ratios.gather(-1, worst)
    return (1 - lead).clamp(min=0).squeeze(-1)  # [groups]


torch.manual_seed(0)
logits = torch.randn(7, 10, 128, requires_grad=True)  # three responses to one prompt and four to another
labels = torch.randint(128, (7, 10))
rewards = torch.randn(7)
ref_logps = -torch.rand(7, 10)
out = rpo_loss(logits, labels, rewards, ref_logps=ref_logps, objective=hinge, group_ids=[0, 0, 0, 1, 1, 1, 1])
out.loss.backward()
print(f"loss {out.loss:.3f}, of each group {[round(x, 3) for x in out.group_losses.tolist()]}")
