"""LoRA: the LM head is frozen, so a step costs two head GEMMs; the reference is the model without its adapter."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from rpo_kernels import RPO, find_head, linear_rpo_loss

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes))  # yours: .from_pretrained("...")
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)

input_ids = torch.randint(128, (8, 12))  # two prompts with four responses each
labels = input_ids.masked_fill(torch.arange(12) < 4, -100)
rewards = torch.randn(8)

for step in range(20):
    with torch.no_grad(), model.disable_adapter():
        ref_hidden = find_head(model).backbone(input_ids=input_ids).last_hidden_state
    head = find_head(model)
    hidden = head.backbone(input_ids=input_ids).last_hidden_state
    out = linear_rpo_loss(
        hidden,
        labels=labels,
        rewards=rewards,
        ref_hidden=ref_hidden,
        objective=RPO("bwd_kl", beta=0.1, eta=1.0),
        num_responses=4,
        shift=True,
        **head.arguments,
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {out.loss:.3f}, accuracy {out.accuracy:.2f}")
