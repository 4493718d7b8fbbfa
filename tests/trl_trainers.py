"""Shared by the tests of TRL's trainers: models, data and trainers small enough to take steps in a second."""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import tokenizers
import torch
import transformers
import trl

from rpo_kernels.integrations.trl import patch

datasets.disable_progress_bars()
GENERATION = "fused head" if hasattr(trl.trainer.utils, "add_fused_lm_head") else "logits"
SIZES = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)
MODELS = {
    "tied": ("Llama", dict(tie_word_embeddings=True)),
    "untied": ("Llama", dict(tie_word_embeddings=False)),
    "softcap": ("Gemma2", dict(final_logit_softcapping=0.05)),
    "scaled": ("Cohere", dict(logit_scale=0.3)),
}
PROMPTS = ["hello there", "how are you", "one", "two words"]
CHOSEN = [" good", " fine thanks", " a b c", " yes"]
REJECTED = [" bad", " not", " d e f g", " no way"]


class Run(NamedTuple):
    """What a training run leaves."""

    history: list[dict[str, float]]
    weights: torch.Tensor
    update: float  # norm of the change of the weights
    trainer: Any


def model(kind: str = "tied", seed: int = 0) -> transformers.PreTrainedModel:
    family, options = MODELS[kind]
    transformers.set_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    return getattr(transformers, f"{family}ForCausalLM")(config)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte; written out here because the trainer's own needs a newer transformers than TRL 0.24."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: index for index, token in enumerate([*special, *sorted(alphabet)])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    pad, bos, eos = special
    options = dict(pad_token=pad, bos_token=bos, eos_token=eos, model_input_names=["input_ids", "attention_mask"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)


def pairs(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(dict(prompt=PROMPTS, chosen=CHOSEN, rejected=REJECTED, **columns))


def build(name: str, policy: Any, settings: dict, peft_config: Any = None) -> Any:
    """A trainer of TRL by name, such as "DPO", with a policy to train."""
    options: dict[str, Any] = dict(processing_class=tokenizer(), peft_config=peft_config)
    if name in ("DPO", "CPO", "ORPO"):
        options["train_dataset"] = pairs()
    elif name == "KTO":
        labels = [True, False] * 2
        data = dict(prompt=PROMPTS, completion=CHOSEN, label=labels)
        options["train_dataset"] = datasets.Dataset.from_dict(data)
    elif name == "SFT":
        options["train_dataset"] = datasets.Dataset.from_dict(dict(prompt=PROMPTS, completion=CHOSEN))
    else:
        options["train_dataset"] = datasets.Dataset.from_dict(dict(prompt=PROMPTS))
        options["reward_funcs"] = vowels
        settings = dict(num_generations=2, max_completion_length=6, beta=0.1) | settings
        if GENERATION == "logits":
            settings = dict(max_prompt_length=64) | settings
    if name in ("DPO", "KTO") and peft_config is None:
        options["ref_model"] = model(settings.pop("_model", "tied"), seed=1)
    settings.pop("_model", None)
    home = trl
    if not hasattr(trl, f"{name}Trainer"):
        home = __import__(f"trl.experimental.{name.lower()}", fromlist=["x"])
    config = getattr(home, f"{name}Config")(**settings)
    if name in ("GRPO", "RLOO") and peft_config is None:
        # Its reference is loaded from disk by the model's name.
        policy.save_pretrained(settings["output_dir"])
        policy.config._name_or_path = str(settings["output_dir"])
    return getattr(home, f"{name}Trainer")(policy, args=config, **options)


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [sum(c in "aeiou" for c in text) + 0.1 * len(text) for text in completions]


def train(
    name: str, out: Path, patched: bool, kind: str = "tied", peft_config: Any = None, steps: int = 2, **settings: Any
) -> Run:
    """A few steps of a trainer, with TRL's own loss layer or with ours; the same otherwise."""
    defaults = dict(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
        _model=kind,
    )
    with warnings.catch_warnings(), patch() if patched else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        trainer = build(name, model(kind), defaults | settings, peft_config)
        return record(trainer)


def record(trainer: Any) -> Run:
    """Let a trainer train."""
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    timing = ("train_runtime", "_per_second", "step_time", "total_flos")
    history = [
        {k: float(v) for k, v in entry.items() if isinstance(v, (int, float)) and not any(t in k for t in timing)}
        for entry in trainer.state.log_history
    ]
    return Run(history, after, float((after - before).norm()), trainer)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten().clone() for p in module.parameters()])


def assert_same(ours: Run, theirs: Run, tolerance: float = 1e-4) -> None:
    """The same metrics by name and, to a tolerance, value, and the same weights after the steps."""
    assert len(ours.history) == len(theirs.history)
    for mine, expected in zip(ours.history, theirs.history):
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("rewards/accuracies") and abs(expected["rewards/margins"]) < 1e-6:
                continue  # policy and reference agree, and rounding decides
            assert abs(mine[name] - value) <= tolerance * max(1.0, abs(value)), (name, mine[name], value)
    assert theirs.update > 0
    assert float((ours.weights - theirs.weights).norm()) <= 10 * tolerance * theirs.update
