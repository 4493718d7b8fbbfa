"""What cannot work is said in one line, through the command, before any model is asked for anything."""

import json

import pytest

transformers = pytest.importorskip("transformers")
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, GPT2Config, MambaConfig, T5Config  # noqa: E402

import rpo_kernels.train.preflight as preflight  # noqa: E402
import rpo_kernels.train.run as run  # noqa: E402
from rpo_kernels.cli import main  # noqa: E402
from rpo_kernels.train.demo import tokenizer  # noqa: E402
from training import tiny_model, write_groups, write_model  # noqa: E402

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that cannot be trained as asked, and data that does not fit."""
    path = tmp_path_factory.mktemp("preflight")
    write_model(path / "model")
    write_groups(path / "train.jsonl", 4)
    configs = {
        "t5": T5Config(vocab_size=259, d_model=16, num_layers=1, d_ff=16, num_heads=2, d_kv=8),
        "mamba": MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4),
        "vit": transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        "gpt2": GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=40),
    }
    for name, config in configs.items():
        config.save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    bert = BertConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertLMHeadModel(bert).save_pretrained(path / "encoder")
    tokenizer().save_pretrained(path / "encoder")
    tiny_model(vocab_size=100).save_pretrained(path / "small-vocabulary")
    write_model(path / "short-vocabulary", vocab_size=100)
    (path / "broken.gguf").write_bytes(b"not a model")
    write_model(path / "packed")
    content = json.loads((path / "packed" / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "packed" / "config.json").write_text(json.dumps(content))
    data = {
        "surrogate": PAIR | {"chosen": "\ud800"},
        "reward": PAIR | {"chosen_reward": 1e39, "rejected_reward": 0},
        "template": {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in PAIR.items()},
        "empty-prompt": PAIR | {"prompt": ""},
    }
    for name, record in data.items():
        (path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    bad = tokenizer()
    bad.chat_template = "{{ raise_exception('roles must alternate') }}"
    for name, changed in (("no-bos", tokenizer()), ("bad-template", bad)):
        tiny_model().save_pretrained(path / name)
        changed.save_pretrained(path / name)
    special = json.loads((path / "no-bos" / "tokenizer_config.json").read_text())
    without = {key: value for key, value in special.items() if key not in ("bos_token", "eos_token")}
    (path / "no-bos" / "tokenizer_config.json").write_text(json.dumps(without))
    assert AutoTokenizer.from_pretrained(path / "no-bos").eos_token is None
    return path


MISTAKES = [
    ("--model t5", "t5 is an encoder-decoder (t5); only causal language models can be trained"),
    ("--model vit", "vit is not a causal language model"),
    ("--model encoder", "BertLMHeadModel is not causal: its logits depend on later tokens"),
    ("--model gpt2 --max-length 41", "--max-length 41 is beyond the 40 positions of gpt2"),
    ("--model small-vocabulary", "cannot load the tokenizer of small-vocabulary"),
    ("--model short-vocabulary", "and short-vocabulary knows 100: the tokenizer is another's"),
    ("--ref-model small-vocabulary", "and small-vocabulary knows 100"),
    ("--ref-model ./absent", "cannot load the model of ./absent"),
    ("--model broken.gguf", "cannot load the tokenizer of broken.gguf"),
    ("--model packed", "the weights of packed are packed (gptq): only an adapter can be trained"),
    ("--lora-rank -1", "lora_rank must be at least 1, or 0 for no adapter; got -1"),
    ("--lora-rank 2 --lora-targets no_such", "LoRA cannot adapt ['no_such'] of LlamaForCausalLM"),
    ("--model mamba --lora-rank 2", "LoRA cannot adapt ['all-linear'] of MambaForCausalLM"),
    ("--adapter merge", "--adapter merge: model is not a LoRA adapter"),
    ("--per-device-train-batch-size 0", "per_device_train_batch_size must be at least 1, got 0"),
    ("--gradient-accumulation-steps 0", "gradient_accumulation_steps"),
    ("--learning-rate=-1", "learning_rate must be at least 0, got -1.0"),
    ("--learning-rate nan", "learning_rate must be at least 0, got nan"),
    ("--max-steps 0", "max_steps must be positive, or -1 for whole epochs; got 0"),
    ("--num-train-epochs 0", "num_train_epochs must be positive, got 0.0"),
    ("--do-train false", "do_train must be True, got False"),
    ("--do-predict true", "do_predict must be False, got True"),
    ("--label-smoothing-factor 0.1", "label_smoothing_factor must be 0.0, got 0.1: smooth preferences with"),
    ("--bf16-full-eval true", "bf16_full_eval must be False, got True: it casts the trained weights"),
    ("--auto-find-batch-size true", "auto_find_batch_size must be False"),
    ("--train-sampling-strategy group_by_length", "train_sampling_strategy must be random or sequential"),
    ("--torch-compile true", "it needs --loss-from logits"),
    ("--fp16 true", "fp16 has no effect on a CPU"),
    ("--fsdp full_shard", "fsdp has no effect on a CPU"),
    ("--eval-strategy epoch", "eval_strategy 'epoch' needs --eval-data"),
    ("--resume-from-checkpoint /nope", "cannot resume from /nope: it has no checkpoint.json"),
    ("--optim adamw_bnb_8bit", "optim adamw_bnb_8bit: "),
    ("--adam-beta1 2", "optim adamw_torch_fused: Invalid beta parameter"),
    ("--lr-scheduler-type cosine_with_min_lr", "lr_scheduler_type cosine_with_min_lr with None: "),
    ("--seed=-1", "seed must be at least 0, got -1"),
    ("--metric-for-best-model bleu", "metric_for_best_model must be one of ['loss', 'accuracy', 'margin'"),
    ("--dataloader-drop-last true --per-device-train-batch-size 5", "leaves nothing of 4 groups in batches of 5"),
    ("--report-to comet_ml", "report_to ['comet_ml']"),
    ("--overwrite --resume", "overwrite removes what --resume would continue"),
    ("--extend", "extend goes with --resume"),
    ("--output-dir train.jsonl/out", "cannot write to --output-dir"),
    ("--cache-dir train.jsonl/cache", "cannot write to --cache-dir"),
    ("--output-dir model", "model holds a model that is not of this trainer"),
    ("--train-data surrogate.jsonl", "surrogate.jsonl:1: chosen holds '\\ud800', half of a character"),
    ("--train-data reward.jsonl", "reward.jsonl:1: chosen_reward must be finite in float32, got 1e+39"),
    (
        "--model bad-template --train-data template.jsonl",
        "template.jsonl:1: the chat template fails on this conversation",
    ),
    ("--model no-bos --train-data empty-prompt.jsonl", "the tokenizer has neither a BOS nor an EOS token"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_before_the_work(folder, words, message, monkeypatch, capsys):
    def asked(*args, **kwargs):
        raise AssertionError("a model was asked for log-probabilities")

    monkeypatch.setattr(run, "attach_reference_logps", asked)
    monkeypatch.chdir(folder)
    argv = ["train", "--model", "model", "--train-data", "train.jsonl", "--output-dir", "out", "--cache-dir", "cache"]
    assert main([*argv, "--use-cpu", "true", *words.split()]) in (1, 2)
    error = capsys.readouterr().err.split("rpo-kernels train: error: ")[1]
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2 and not (folder / "out" / "metrics.json").exists()


def test_liger_kernel_is_missed_before_the_work(folder, monkeypatch, capsys):
    """Whether or not it is installed here."""
    monkeypatch.setattr(preflight, "is_liger_kernel_available", lambda: False)
    words, message = "--use-liger-kernel true", "needs the package liger-kernel"
    test_a_mistake_is_one_line_before_the_work(folder, words, message, monkeypatch, capsys)
