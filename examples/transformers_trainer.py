"""RPO in transformers' own Trainer, from hidden states. Model and data are small ones."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from rpo_kernels import RPO
from rpo_kernels.integrations.transformers import PreferenceLoss
from rpo_kernels.train.demo import model, tokenizer

encode = tokenizer()
examples = [  # prompt, responses, rewards, and the responses' log-probabilities under the reference model
    ("Name a fruit.", [" A pear.", " Pears", " Stone."], [3.0, 2.0, 0.0], [-45.0, -34.0, -39.0]),
    ("Name a colour.", [" Blue.", " Seven."], [1.5, -1.0], [-34.0, -40.0]),
]


def collate(batch: list) -> dict:
    """Responses of all groups one below the other."""
    prompts = [encode(prompt)["input_ids"] for prompt, responses, *_ in batch for _ in responses]
    answers = [encode(response)["input_ids"] for _, responses, *_ in batch for response in responses]
    rows = list(zip(prompts, answers))
    tokens = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in rows]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "rewards": torch.tensor([reward for *_, rewards, _ in batch for reward in rewards]),
        "ref_logps": torch.tensor([logp for *_, logps in batch for logp in logps]),
        "group_sizes": [len(responses) for _, responses, *_ in batch],
    }


policy = model()
loss = PreferenceLoss(policy, RPO(beta=0.5))
trainer = Trainer(
    model=policy,
    args=TrainingArguments("trainer-rpo", max_steps=6, logging_steps=2, remove_unused_columns=False, report_to="none"),
    train_dataset=examples,
    data_collator=loss.collate(collate),
    compute_loss_func=loss,
)
trainer.train()
