"""A plain PyTorch loop: DPO on pairs, the loss computed from hidden states and the LM head."""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rpo_kernels import DPO, find_head, linear_rpo_loss, linear_token_logprobs

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes))  # yours: .from_pretrained("...")
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# Eight prompts of 4 tokens with two responses of 8 each, side by side: chosen, rejected, chosen, rejected, ...
input_ids = torch.randint(128, (16, 12))
labels = input_ids.clone()
labels[:, :4] = -100  # prompt tokens are not scored; neither is padding
rewards = torch.tensor([1.0, 0.0]).repeat(8)


def hidden_states(of):
    head = find_head(of)
    return head.backbone(input_ids=input_ids).last_hidden_state, head.arguments


with torch.no_grad():
    hidden, head = hidden_states(reference)
    ref_logps = linear_token_logprobs(hidden, labels=labels, shift=True, **head).sum(-1)

for step in range(20):
    hidden, head = hidden_states(model)
    out = linear_rpo_loss(
        hidden, labels=labels, rewards=rewards, ref_logps=ref_logps, objective=DPO(), shift=True, **head
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {out.loss:.3f}, accuracy {out.accuracy:.2f}, margin {out.margin:.2f}")
