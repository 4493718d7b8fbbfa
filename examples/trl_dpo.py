"""TRL's quick start for DPO, one line longer. Model and data are small ones, so that it runs anywhere in seconds."""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import rpo_kernels.integrations.trl
from rpo_kernels.train.demo import model, tokenizer

rpo_kernels.integrations.trl.patch()  # the line

dataset = Dataset.from_dict(  # yours: load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    {
        "prompt": ["Name a fruit.", "Name a colour.", "Name a river.", "Name a city."],
        "chosen": [" A pear.", " Blue.", " The Rhine.", " Lisbon."],
        "rejected": [" Stone.", " Seven.", " A chair.", " Tuesday."],
    }
)
trainer = DPOTrainer(
    model=model(),  # yours: model="Qwen/Qwen3-0.6B", and no ref_model, processing_class or args
    ref_model=model(),
    args=DPOConfig("trl-dpo", max_steps=6, learning_rate=1e-3, logging_steps=2, bf16=False, report_to="none"),
    processing_class=tokenizer(),
    train_dataset=dataset,
)
trainer.train()
