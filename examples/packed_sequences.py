"""Packed sequences: responses of different lengths one after the other, without padding, told apart by `cu_seqlens`."""

import torch

from rpo_kernels import RPO, rpo_loss

torch.manual_seed(0)
lengths = torch.tensor([5, 9, 3, 7])  # two prompts, two responses each
cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # [0, 5, 14, 17, 24]
input_ids = torch.randint(128, (24,))
logits = torch.randn(24, 128, requires_grad=True)  # of a model that attends within each sequence only
rewards = torch.tensor([0.5, -1.0, 2.0, 1.5])

# shift=True: the logits at t predict the token at t + 1, and the first token of each sequence is not scored.
out = rpo_loss(
    logits,
    labels=input_ids,
    rewards=rewards,
    ref_logps=torch.zeros(4),  # one sum a sequence, or [24] one a token
    objective=RPO(beta=0.1, eta=1.0),
    cu_seqlens=cu_seqlens,
    shift=True,
)
out.loss.backward()
print(f"loss {out.loss:.3f}, log-probability of each response {[round(x, 1) for x in out.logps.tolist()]}")
