"""A plain PyTorch loop in which each prompt is computed once for all its responses, and nothing is padded."""

import copy
import random

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rpo_kernels import RPO, find_head, linear_rpo_loss, linear_token_logprobs
from rpo_kernels.shared_prompts import SharedPromptCollator, attention_mask, check_shared_prompts

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes))  # yours: .from_pretrained("...")
check_shared_prompts(model)  # a ValueError that says why, for models it is not exact for
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


# Your tokenised data: prompts of 40 tokens, two to five responses of 3 to 12 tokens each, and their rewards.
def tokens(low, high):
    return [random.randrange(128) for _ in range(random.randint(low, high))]


random.seed(0)
groups = []
for _ in range(8):
    responses = [tokens(3, 12) for _ in range(random.randint(2, 5))]
    groups.append(
        {"prompt": tokens(40, 40), "responses": responses, "rewards": [random.gauss(0, 1) for _ in responses]}
    )

batch = SharedPromptCollator()(groups)
targets = dict(labels=batch["labels"], rows=batch["label_rows"])


def hidden_states(of):
    head = find_head(of)
    inputs = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    hidden = head.backbone(**inputs, attention_mask=attention_mask(of, batch)).last_hidden_state
    return hidden[0], head.arguments


with torch.no_grad():
    hidden, head = hidden_states(reference)
    ref_logps = linear_token_logprobs(hidden, **targets, **head)

group_ids = [group for group, size in enumerate(batch["group_sizes"]) for _ in range(size)]
for step in range(20):
    hidden, head = hidden_states(model)
    out = linear_rpo_loss(
        hidden,
        rewards=batch["rewards"],
        ref_logps=ref_logps,
        objective=RPO(),
        cu_seqlens=batch["cu_seqlens"],
        group_ids=group_ids,
        **targets,
        **head,
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {out.loss:.3f}, accuracy {out.accuracy:.2f}, margin {out.margin:.2f}")

separate = sum(len(g["prompt"]) + len(r) for g in groups for r in g["responses"])
print(f"{batch['input_ids'].numel()} tokens a step; as separate sequences {separate}, without padding")
