"""Diffusion-DPO (arXiv 2311.12908) with `score_loss`: a small denoising model learns which samples to prefer."""

import copy

import torch

from rpo_kernels import DPO, score_loss

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))  # (x_t, t) -> noise
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
samples = torch.randn(128, 2)  # two samples a prompt, one after the other
rewards = samples[:, 0]  # the more to the right, the better

for step in range(30):
    # One noise and one time for both samples of a prompt, so that their errors can be compared.
    noise = torch.randn(64, 2).repeat_interleave(2, 0)
    time = torch.rand(64, 1).repeat_interleave(2, 0)
    noisy = torch.cat(((1 - time).sqrt() * samples + time.sqrt() * noise, time), -1)
    error = (model(noisy) - noise).square().sum(-1)
    reference_error = (reference(noisy) - noise).square().sum(-1)
    output = score_loss(reference_error - error, rewards, objective=DPO(beta=5.0))
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {output.loss:.3f}, accuracy {output.accuracy:.2f}")
