"""Shared by the trainer's tests: a model and data small enough to train in seconds."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from rpo_kernels.train import Group, PreferenceDataset, RPOArguments
from rpo_kernels.train.demo import tokenizer


def tiny_model(seed: int = 0, **config) -> LlamaForCausalLM:
    set_seed(seed)
    sizes = dict(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**(sizes | config)))


def groups(count: int, sizes: tuple[int, ...] = (3,), seed: int = 0) -> list[Group]:
    """Groups of random words; `sizes` are taken in turn."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(["tea", "river", "seven", "blue"]) for _ in range(rng.randint(low, high)))

    return [
        Group(words(1, 4), [words(1, 6) for _ in range(size)], [rng.uniform(-2, 2) for _ in range(size)])
        for size in (sizes[g % len(sizes)] for g in range(count))
    ]


def write_model(path: Path, **config) -> None:
    """A directory with a tiny model and its tokenizer."""
    tiny_model(**config).save_pretrained(path)
    tokenizer().save_pretrained(path)


def write_groups(path: Path, count: int, sizes: tuple[int, ...] = (3,), seed: int = 0) -> None:
    """A file of preference data."""
    with open(path, "w") as file:
        for group in groups(count, sizes, seed):
            responses = [{"text": t, "reward": r} for t, r in zip(group.responses, group.rewards, strict=True)]
            file.write(json.dumps({"prompt": group.prompt, "responses": responses}) + "\n")


def dataset(count: int, sizes: tuple[int, ...] = (3,), seed: int = 0, max_length: int = 64) -> PreferenceDataset:
    return PreferenceDataset(groups(count, sizes, seed), tokenizer(), max_length)


def with_reference(data: PreferenceDataset, seed: int = 1) -> PreferenceDataset:
    """Give the examples made-up reference log-probabilities, near a random model's."""
    rng = random.Random(seed)
    data.ref_logps = np.array([-5.55 * len(r) + rng.uniform(-3, 3) for example in data for r in example.responses])
    return data


def arguments(output_dir: Path, **changes) -> RPOArguments:
    settings = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    return RPOArguments(**(settings | changes))


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
