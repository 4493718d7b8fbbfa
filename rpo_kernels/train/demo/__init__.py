"""The embedded demonstration: a small model and tokenizer built in code, and a preference set written for them.

The 96 training and 32 held-out prompts have four responses each, rewarded by quality: polite and complete, plain,
bare, repetitive, evasive, off topic, rude. Starting from random weights, a byte-level model learns to tell these apart
on prompts and responses it has not seen. It does not learn to answer: it is far too small for that.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parent
SPECIAL = ("<pad>", "<s>", "</s>")
FLAGS = [
    *("--train_data", str(DATA / "train.jsonl"), "--eval_data", str(DATA / "test.jsonl")),
    *("--output_dir", "rpo-demo", "--max_length", "256"),
    *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "16", "--num_train_epochs", "4"),
    *("--learning_rate", "2e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "8"),
    *("--eval_strategy", "epoch", "--save_strategy", "no", "--plot", "true"),
    *("--overwrite", "true"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after three special ones."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos)


def model() -> LlamaForCausalLM:
    """A Llama of 0.25 million parameters with random weights (from torch's current seed)."""
    return LlamaForCausalLM(config())


def config() -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
