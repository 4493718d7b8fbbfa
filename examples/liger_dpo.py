"""Liger's fused DPO loss on this package's head: only the import changes."""

import torch

# from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from rpo_kernels.integrations.liger import LigerFusedLinearDPOLoss

torch.manual_seed(0)
vocab, width = 128, 32
weight, ref_weight = torch.randn(2, vocab, width).mul(0.3).requires_grad_().unbind(0)
hidden = torch.randn(4, 12, width, requires_grad=True)  # two chosen responses above two rejected ones
ref_hidden = torch.randn(4, 12, width)
target = torch.randint(vocab, (4, 12)).masked_fill(torch.arange(12) < 4, -100)

loss_fn = LigerFusedLinearDPOLoss(beta=0.1, loss_type="sigmoid")
loss, (chosen_logps, rejected_logps, *_) = loss_fn(
    weight, hidden, target, ref_input=ref_hidden, ref_weight=ref_weight.detach()
)
loss.backward()
print(f"loss {loss:.3f}, chosen {chosen_logps.mean():.1f}, rejected {rejected_logps.mean():.1f}")
