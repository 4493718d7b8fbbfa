"""RPO in TRL: prompts with any number of responses, each with a reward. Model and data are small ones."""

from datasets import Dataset

from rpo_kernels import RPO
from rpo_kernels.integrations.trl import RPOConfig, RPOTrainer
from rpo_kernels.train.demo import model, tokenizer

dataset = Dataset.from_dict(
    {
        "prompt": ["Name a fruit.", "Name a colour.", "Name a river.", "Name a city."],
        "responses": [[" A pear.", " Pears", " Stone."], [" Blue.", " Seven."], [" The Rhine.", " A."], [" Rome."]],
        "rewards": [[3.0, 2.0, 0.0], [1.5, -1.0], [2.0, 0.5], [1.0]],
    }
)
trainer = RPOTrainer(
    model=model(),  # yours: a name or a directory; RPOTrainer takes what DPOTrainer takes
    ref_model=model(),
    args=RPOConfig("trl-rpo", max_steps=6, learning_rate=1e-3, logging_steps=2, bf16=False, report_to="none"),
    objective=RPO("bwd_kl", beta=0.5, eta=1.0),
    processing_class=tokenizer(),
    train_dataset=dataset,
)
trainer.train()
